"""What the study trains on preference pairs: RPO as in the paper, and what differs from it in one thing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A training run on pairs.

    name, title: of its folder, and in tables. start: the model it begins with, which is the reference too, and whose
    own answers the pairs are made of. strategy: what is preferred over a wrong answer (see `medllm pairs`). settings:
    what differs from the config for RPO.
    """

    name: str
    title: str
    start: str = "cpt"
    strategy: str = "both"
    settings: tuple[str, ...] = ()

    @property
    def pairs(self) -> str:
        return f"pairs-{self.start}-{self.strategy}"


# The preference term is gone where beta is tiny: its gradient is in proportion to beta.
_NLL_ALONE = ("--objective.beta", "1e-6")
_FAST = ("--optimizer.learning_rate", "2e-4")  # four times that of the others

VARIANTS = (
    Variant("rpo", "CPT + RPO"),
    Variant("dpo", "CPT + DPO", settings=("--objective.alpha", "0")),
    Variant("nll", "CPT + NLL alone", settings=_NLL_ALONE),
    Variant("base-rpo", "RPO without CPT", start="base"),
    Variant("gold", "RPO, gold pairs", strategy="gold"),
    Variant("onpolicy", "RPO, on-policy pairs", strategy="onpolicy"),
    Variant("gold-nll", "NLL alone, gold answers", strategy="gold", settings=_NLL_ALONE),
    Variant("beta-low", "RPO, beta 0.03", settings=("--objective.beta", "0.03")),
    Variant("beta-high", "RPO, beta 0.3", settings=("--objective.beta", "0.3")),
    Variant("rpo-2", "RPO, second round", start="rpo"),
    Variant("rpo-fast", "RPO, learning rate 2e-4", settings=_FAST),
    Variant("dpo-fast", "DPO, learning rate 2e-4", settings=("--objective.alpha", "0", *_FAST)),
    Variant("nll-fast", "NLL alone, learning rate 2e-4", settings=(*_NLL_ALONE, *_FAST)),
)

# Every model that is examined, in the order of tables: name -> title.
MODELS = {"base": "base", "cpt": "CPT", **{variant.name: variant.title for variant in VARIANTS}}
STAGES = ("base", "cpt", "rpo")  # the recipe itself
EXAMS = ("test", "transfer")
