"""The process that compiles, so that the compiler's crashes, memory and output stay apart and it can be ended halfway.

`python -m medllm_jax.planning.child FOLDER` reads `request.json` there and writes for each program of the run, in turn,
`NAME.json` (what it is), the compiler's dumps into `NAME/`, and `NAME.done`; or `error.json`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from medllm_jax.checkpoint.load_model import LoadedModel
from medllm_jax.config.load import build
from medllm_jax.config.schema import PrecisionConfig
from medllm_jax.distributed.chips import parse_topology
from medllm_jax.distributed.compiler_options import compiler_options
from medllm_jax.distributed.sharding import check_divisible, make_mesh
from medllm_jax.errors import UserError
from medllm_jax.evaluation.sampling import SamplingParams
from medllm_jax.inference.generator import Generator
from medllm_jax.model.abstract import abstract_model, merge_params
from medllm_jax.training.programs import abstract_batch, score_program, train_program
from medllm_jax.training.resolve import ResolvedConfig

Compile = Callable[[str, jax.stages.Lowered, dict[str, Any]], jax.stages.Compiled]


def compile_request(folder: Path) -> None:
    """Compiles the program that a folder's request names, as a run would, for devices that are not there."""
    request = json.loads((folder / "request.json").read_text())
    config = build(ResolvedConfig, request["config"], "the config")
    topology = parse_topology(request["topology"], request["slices"])
    mesh = make_mesh(config.mesh, topology.devices())
    places = [[*device.coords, getattr(device, "slice_index", 0)] for device in mesh.devices.flat]

    def compile_program(name: str, lowered: jax.stages.Lowered, arguments: dict[str, Any]) -> jax.stages.Compiled:
        facts = {
            "mesh": dict(mesh.shape),
            "places": places,
            "bytes": {group: _bytes(tree) for group, tree in arguments.items()},
        }
        (folder / f"{name}.json").write_text(json.dumps(facts))
        dump = {"xla_dump_to": str(folder / name), "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=compiler_options(mesh) | dump)
        (folder / f"{name}.done").touch()
        return compiled

    prepare = {"train": _train, "reference": _reference, "generate": _generate}[request["program"]]
    prepare(config, mesh, request, compile_program)


def _train(config: ResolvedConfig, mesh: Any, request: dict, compile_program: Compile) -> None:
    pairs = request["pairs_per_row"] if config.objective.name == "rpo" else None
    program = train_program(config, mesh)
    batch = abstract_batch(mesh, config.data.batch_size, request["sequence_length"], pairs)
    state, frozen = program.abstract, program.model.frozen
    rest = (state.opt_state, state.step, state.key)
    arguments = {"parameters": state.params, "frozen": frozen, "optimizer": rest, "batch": batch}
    compile_program("train", program.step.lower(state, batch, frozen), arguments)


def _reference(config: ResolvedConfig, mesh: Any, request: dict, compile_program: Compile) -> None:
    rows = config.data.batch_size // config.data.accumulate
    check_divisible(mesh, config.model, rows)
    model = abstract_model(config.model, config.precision, mesh, attention=config.attention, adapter=config.adapter)
    batch = abstract_batch(mesh, rows, request["sequence_length"], None)
    score = score_program(model.structure, mesh, request["pairs_per_row"], config.objective.vocab_chunks)
    params = merge_params(model.abstract, model.frozen)
    compile_program("reference", score.lower(params, batch), {"parameters": params, "batch": batch})


def _generate(config: ResolvedConfig, mesh: Any, request: dict, compile_program: Compile) -> None:
    compute = config.precision.compute
    precision = PrecisionConfig(params=compute, compute=compute)
    model = abstract_model(config.model, precision, mesh, adapter=config.adapter)
    params = merge_params(model.abstract, model.frozen)
    loaded = LoadedModel(model.config, model.structure, params, mesh)
    generator = Generator(loaded, None, [0], config.data.batch_size // config.data.accumulate)
    sampling = SamplingParams(max_new_tokens=request["new_tokens"])
    prefill = generator.lower_prefill(request["sequence_length"], sampling)
    compiled = compile_program("prefill", prefill, {"parameters": params})
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        prefill.out_info,
        compiled.output_shardings,
    )
    decode = generator.lower_decode(state, sampling)
    compile_program("decode", decode, {"parameters": params, "cache": state.cache})


def _bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    shards = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return sum(jax.ShapeDtypeStruct(shape, dtype).size * dtype.itemsize for shape, dtype in shards)


def main(folder: Path) -> int:
    try:
        compile_request(folder)
    except UserError as error:
        (folder / "error.json").write_text(json.dumps({"input": str(error)}))
        return 2
    except RuntimeError as error:  # the compiler's: it does not fit, or it can't be compiled
        (folder / "error.json").write_text(json.dumps({"compiler": str(error).strip() or type(error).__name__}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
