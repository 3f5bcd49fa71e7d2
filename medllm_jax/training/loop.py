"""The story of a run, CPT and RPO alike, from top to bottom."""

import functools

from etils import epath

from medllm_jax.checkpoint.orbax import CheckpointWriter
from medllm_jax.config.schema import RunConfig
from medllm_jax.data.order import check_mix
from medllm_jax.data.prefetch import Prefetcher, put_batch
from medllm_jax.data.rows import Seen
from medllm_jax.distributed.processes import run_on_all
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import UserError
from medllm_jax.observability.profiler import Profiler
from medllm_jax.reliability.bad_steps import BadStepGuard
from medllm_jax.reliability.supervision import supervised
from medllm_jax.storage import run_folder
from medllm_jax.training.announce import AnnouncedStep, announce
from medllm_jax.training.programs import train_program
from medllm_jax.training.resolve import open_source, resolve
from medllm_jax.training.setup import (
    open_held_out,
    open_progress,
    open_rows,
    open_session,
    open_stream,
    references_of,
    restore_or_init,
)


def train(config: RunConfig, *, force: bool = False) -> epath.Path:
    """Trains until `config.steps`, from the newest good checkpoint of the run folder if it has one. Returns the folder.

    force: goes on with a config that computes something else than the one that the run was started with.

    Raises:
      UserError: config and input don't fit the run, or each other.
      Preempted: the process got SIGTERM, or Ctrl-C (then `Interrupted`), and what there was to save is saved.
      RunError: the run can't go on, and says why.
    """
    source = open_source(config)
    config = resolve(config, source)
    folder, changes = run_on_all("opening the run folder", lambda: run_folder.open_run(config, force=force), UserError)
    rows = open_rows(config, config.data.stores)
    if config.data.mix is not None:
        check_mix(rows, config.data.mix)
    mesh = make_mesh(config.mesh)
    program = train_program(config, mesh)

    with supervised(folder, config.watchdog.seconds) as (lease, watch, preemption):
        start, state, meta, frozen = restore_or_init(config, source, folder, rows, program, watch)
        reference = references_of(config, rows, meta["reference_model"])
        held_out = open_held_out(config, program, mesh, meta["reference_model"])
        seen, step = Seen(rows, meta["seen"]), start
        guard = BadStepGuard(config.guard, meta["skipped"], folder)
        started = run_on_all("writing to the run folder", lambda: open_session(config, folder, start, changes))

        put = functools.partial(put_batch, mesh=mesh)
        with (
            open_stream(config, rows, meta["position"], reference) as stream,
            open_progress(config, folder, start, started, seen, guard, rows.sequence_length, lease.check) as progress,
            Prefetcher(map(put, stream), busy=progress.device_is_busy) as batches,
            CheckpointWriter(folder, every=config.checkpoint.every, keep=config.checkpoint.keep) as checkpoints,
            Profiler(config.profiled, folder) as profiler,
        ):
            announce(config, rows, program, start)
            take_step = AnnouncedStep(config, rows, program, mesh)
            for step in range(start + 1, config.steps + 1):
                watch.stage(f"reading the batch of step {step}")
                batch = next(batches)
                watch.stage(f"step {step}")
                profiler.before(step)
                state, metrics = take_step(state, batch.arrays, frozen)
                preemption.arm()
                profiler.after(step, state)
                if held_out is not None and held_out.due(step):
                    metrics |= held_out.measure(state.params, frozen)
                progress.add(step, metrics, batch.row_ids, batches.waited)
                last = preemption.requested(step) or step == config.steps
                if last or checkpoints.due(step):
                    watch.stage(f"saving step {step}")
                    progress.settle(step)  # first: a run that goes on must find the lines of steps that it passes over
                    lease.check()
                    now = {"position": batch.position, "seen": seen.counts, "skipped": progress.skipped}
                    checkpoints.save(step, state, meta | now, force=last)
                if last:
                    break
            watch.stage(f"writing what is left of step {step}")
        progress.summarise()
        if step < config.steps:
            raise preemption.ended(f"step {step} of {config.steps} is saved")
    return folder
