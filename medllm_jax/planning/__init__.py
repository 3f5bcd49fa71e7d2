"""Plans a run on TPUs that are not there: compiles it for them, reads the compiler's dumps and estimates its time."""
