"""What a run costs on TPUs that are not there: compiled for them, read from the compiler's dump, estimated by hand."""
