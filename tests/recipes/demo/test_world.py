"""The miniature world: same seed, same world; fair exams; one token a term."""

import json
from itertools import combinations

import pytest
from transformers import AutoTokenizer

from medllm_jax.evaluation.exam import LETTERS, load_exam
from medllm_jax.evaluation.extraction.extract import extract
from medllm_jax.evaluation.grading import grade
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.recipes.demo import world
from medllm_jax.recipes.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer

SEEDS = (0, 1, 2)
TERMS = (*world.facts(), *(value for attribute in world.ATTRIBUTES for value in world.values(attribute)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.write_world(tmp_path_factory.mktemp("world"), seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(
        train_tokenizer(world.tokenizer_texts(), tmp_path_factory.mktemp("tokenizer"), vocab_size=1536)
    )


def documents(folder, name):
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]


# --- facts -----------------------------------------------------------------------------------------------------------


def test_every_value_is_shared_and_every_alternative_is_a_value():
    for attribute in world.ATTRIBUTES:
        held = [of[attribute].value for of in world.facts().values()]
        assert min(map(held.count, held)) >= 2, "a value of one disease alone would give it away"
        for of in world.facts().values():
            fact = of[attribute]
            assert fact.also <= set(held), (fact.disease, fact.also - set(held))
            assert fact.value not in fact.also


def test_no_term_means_two_things():
    kinds = [set(world.facts()), *(set(world.values(attribute)) for attribute in world.ATTRIBUTES)]
    assert not any(one & other for one, other in combinations(kinds, 2))


# --- documents -------------------------------------------------------------------------------------------------------


def test_a_world_is_a_function_of_its_seed(folder, tmp_path):
    again = world.write_world(tmp_path / "again", seed=0)
    other = world.write_world(tmp_path / "other", seed=1)
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*.jsonl")):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
        assert (other / file).read_bytes() != (folder / file).read_bytes()


def test_the_base_has_read_little_about_the_new_diseases_and_seen_no_question_about_them(folder):
    parts = world.split(0)
    new = [disease for exam in world.EXAMS for disease in parts[exam]]
    texts = documents(folder, "base")
    about_new = [text for text in texts if any(disease in text for disease in new)]
    assert 0 < len(about_new) < 0.03 * len(texts)
    for text in (*about_new, *documents(folder, "cpt")):
        assert not text.startswith("問題") or not any(f"問題:{disease}" in text for disease in new)
        assert "解説" not in text or not any(disease in text for disease in new)


def test_no_statement_is_false(folder):
    told = {
        form.format(d=disease, v=fact.value)
        for disease, of in world.facts().items()
        for attribute, fact in of.items()
        for form in world._STATE[attribute]
    }
    for text in documents(folder, "base") + documents(folder, "cpt"):
        prose = text if not text.startswith("問題") else text.partition("解説:")[2].partition("\n")[0]
        assert all(f"{sentence}。" in told for sentence in prose.split("。") if sentence), text


def test_questions_answered_at_once_are_answered_rightly(folder):
    asked = {
        world._ASK[attribute].format(d=disease): fact.value
        for disease, of in world.facts().items()
        for attribute, fact in of.items()
    }
    kinds = {"right": 0, "astray": 0}
    for text in documents(folder, "base"):
        if text.startswith("問題"):
            question, *choices = text.partition("\n答え")[0].partition("\n解説")[0].split("\n")
            answer = text.rpartition("答え:")[2]
            right = answer == asked[question.removeprefix("問題:")]
            assert len(set(choices)) == world.CHOICES and answer in choices
            assert right or "解説" in text
            if "解説" in text:
                kinds["right" if right else "astray"] += 1
    assert abs(kinds["astray"] / sum(kinds.values()) - world.ASTRAY_SHARE) < 0.03


# --- exams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_no_disease_is_in_two_exams_or_known_to_the_base(seed):
    parts = world.split(seed)
    assert sorted(disease for part in parts.values() for disease in part) == sorted(world.facts())
    exams = world.exams(seed)
    assert {name: {row.question for row in rows} for name, rows in exams.items()} == {
        name: {world._ASK[attribute].format(d=disease) for disease in parts[name] for attribute in world.ATTRIBUTES}
        for name in world.EXAMS
    }
    every = [row for rows in exams.values() for row in rows]
    assert len({row.id for row in every}) == len(every)
    assert len({(row.question, frozenset(row.choices)) for row in every}) == len(every)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_question_has_one_right_choice_and_explains_it(seed):
    asked = {
        world._ASK[attribute].format(d=disease): fact
        for disease, of in world.facts().items()
        for attribute, fact in of.items()
    }
    for rows in world.exams(seed).values():
        for row in rows:
            fact = asked[row.question]
            assert len(set(row.choices)) == world.CHOICES
            assert row.choices[LETTERS.index(row.answer)] == fact.value
            assert not fact.also & set(row.choices)
            assert fact.disease in row.explanation and fact.value in row.explanation
            assert not any(one in other for one in row.choices for other in row.choices if one != other)
        letters = [row.answer for row in rows]
        assert max(letters.count(letter) for letter in LETTERS[: world.CHOICES]) < 0.3 * len(rows)


def test_the_exam_reader_and_the_extractor_read_this_world(folder):
    template = load_template(world.TEMPLATE)
    exam = load_exam(folder / "exam" / "test.jsonl")
    for question in exam.questions:
        for condition in ("answer_only", "explain"):
            for letter, words in zip(question.letters, question.choices, strict=True):
                text = template.condition(condition).solution.format(answer=words, explanation=question.explanation)
                graded = grade(question, extract(question, text, "stop", condition))
                assert graded.correct == (frozenset(letter) in question.gold), (question, text)


def test_documents_have_the_exams_own_form(folder):
    template = load_template(world.TEMPLATE)
    questions = [text for text in documents(folder, "base") if text.startswith("問題")]
    for condition in ("answer_only", "explain"):
        settings = template.condition(condition)
        solved = [text.partition(settings.cue)[2] for text in questions if f"\n{settings.cue}" in text]
        assert len(solved) > 1000
        assert not any(stop in text for stop in settings.stop for text in solved if condition == "explain")


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_qwen2s_and_round_trips(tokenizer, folder):
    assert "Qwen2" in type(tokenizer).__name__
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(tokenizer) - 3, len(tokenizer)))
    texts = [*documents(folder, "base")[:2000], "ABC 123\n\n 𝛼β がぎ", ""]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_the_tokenizer_normalises_as_qwen2_does(tokenizer):
    assert tokenizer.decode(tokenizer("か\u3099")["input_ids"]) == "が"  # NFC


def test_the_slow_files_say_the_same_as_the_fast_one(tokenizer, folder, tmp_path):
    written = json.loads((train_tokenizer(world.tokenizer_texts(), tmp_path, 1536) / "tokenizer.json").read_text())
    assert json.loads((tmp_path / "vocab.json").read_text()) == written["model"]["vocab"]
    merges = [tuple(line.split(" ")) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    assert merges == [tuple(merge) for merge in written["model"]["merges"]]
    assert len(tokenizer) == len(written["model"]["vocab"]) + len(SPECIAL_TOKENS)


def test_terms_are_single_tokens_in_running_text(tokenizer, folder):
    ids = {term: tokenizer(term)["input_ids"] for term in TERMS}
    assert all(len(of) == 1 for of in ids.values())
    split_up = 0
    texts = documents(folder, "base")[:3000]
    for text, tokens in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        disease = next((d for d in sorted(world.facts(), key=len, reverse=True) if d in text), None)
        split_up += disease is not None and ids[disease][0] not in tokens
    assert split_up < 0.01 * len(texts)


def test_rows_of_the_exam_are_short(tokenizer, folder):
    template = load_template(world.TEMPLATE)
    for question in load_exam(folder / "exam" / "test.jsonl").questions:
        prompt = tokenizer(template.render(question, "explain"))["input_ids"]
        assert len(prompt) < 32
