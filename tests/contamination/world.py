"""An exam of random text, and text of the same words."""

import random

from medllm_jax.evaluation.exam import Exam, Question

_WORDS = ("患者", "発熱", "咳嗽", "肺炎", "血圧", "治療", "検査", "所見", "診断", "心臓", "男性", "投与")


def text_of(seed, words=40):
    rng = random.Random(seed)
    return "、".join("".join(rng.choices(_WORDS, k=3)) for _ in range(words // 3)) + "。"


def question(number):
    choices, gold = ("選択肢の一", "選択肢の二"), frozenset({frozenset("a")})
    return Question(id=f"q{number}", text=text_of(number), choices=choices, gold=gold, year=2020)


EXAM = Exam("small", tuple(map(question, range(6))))
