"""The miniature world: same seed, same world; nothing false in it; fair exams; one token a term."""

import json
from itertools import combinations

import pytest
from transformers import AutoTokenizer

from medllm_jax.evaluation.exam import LETTERS, load_exam
from medllm_jax.evaluation.extraction.extract import extract
from medllm_jax.evaluation.grading import grade
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.recipes.demo import author, corpora, world
from medllm_jax.recipes.demo.recipe import DEMO
from medllm_jax.recipes.demo.stages import VOCABULARY
from medllm_jax.recipes.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer
from medllm_jax.recipes.demo.wordings import WORDINGS, Statement, explained, statements_in

SEEDS = (0, 1, 2)
DOCUMENTS = DEMO.base_documents
TERMS = (*world.facts(), *(value for attribute in world.ATTRIBUTES for value in world.values(attribute)))
FACTS = [fact for known in world.facts().values() for fact in known.values()]
TOLD = {form.format(d=fact.disease, v=fact.value) for fact in FACTS for form in WORDINGS[fact.attribute].statements}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpora.write_world(tmp_path_factory.mktemp("world"), seed=0, base_documents=DOCUMENTS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    return AutoTokenizer.from_pretrained(train_tokenizer(corpora.tokenizer_texts(), place, VOCABULARY))


def documents(folder, name):
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
    return ["".join(row.values()) for row in rows]


def new_diseases(seed):
    parts = world.split(seed)
    return [disease for exam in world.EXAMS for disease in parts[exam]]


# --- facts -----------------------------------------------------------------------------------------------------------


def test_every_value_is_shared_and_every_alternative_is_a_value():
    for attribute in world.ATTRIBUTES:
        held = [fact.value for fact in world.of(attribute)]
        assert min(map(held.count, held)) >= 2, "a value of one disease alone would give it away"
        for fact in world.of(attribute):
            assert fact.also <= set(held), (fact.disease, fact.also - set(held))
            assert fact.value not in fact.also


def test_no_term_means_two_things():
    kinds = [set(world.facts()), *(set(world.values(attribute)) for attribute in world.ATTRIBUTES)]
    assert not any(one & other for one, other in combinations(kinds, 2))


# --- documents -------------------------------------------------------------------------------------------------------


def test_a_world_is_a_function_of_its_seed(folder, tmp_path):
    again = corpora.write_world(tmp_path / "again", seed=0, base_documents=DOCUMENTS)
    other = corpora.write_world(tmp_path / "other", seed=1, base_documents=DOCUMENTS)
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*.jsonl")):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
        assert (other / file).read_bytes() != (folder / file).read_bytes()


def test_the_base_has_read_little_about_the_new_diseases_and_seen_no_question_about_them(folder):
    new = new_diseases(0)
    texts = documents(folder, "base")
    statements = [text for text in texts if not text.startswith("問題")]
    about_new = [text for text in statements if any(disease in text for disease in new)]
    assert abs(len(about_new) / len(statements) - author.NEW_SHARE) < 0.02
    whole_names = sorted(world.facts(), key=len, reverse=True)
    for text in (*texts, *documents(folder, "cpt")):
        if text.startswith("問題"):
            named = text
            for disease in whole_names:  # one name may contain another
                if disease in named:
                    assert disease not in new, text
                    named = named.replace(disease, "")


def test_no_statement_is_false(folder):
    for text in documents(folder, "base") + documents(folder, "cpt"):
        prose = text if not text.startswith("問題") else text.partition("解説:")[2].partition("\n")[0]
        assert all(f"{sentence}。" in TOLD for sentence in prose.split("。") if sentence), text


def test_every_question_is_answered_rightly(folder):
    forms = {form for words in WORDINGS.values() for form in (*words.questions, words.reversed)}
    right = {}
    for fact in FACTS:
        for form in forms & {*WORDINGS[fact.attribute].questions, WORDINGS[fact.attribute].reversed}:
            answer = fact.disease if form == WORDINGS[fact.attribute].reversed else fact.value
            right.setdefault(form.format(d=fact.disease, v=fact.value), set()).add(answer)
    explained_ones = 0
    for text in documents(folder, "base"):
        if text.startswith("問題"):
            question, *choices = text.partition("\n答え")[0].partition("\n解説")[0].split("\n")
            answers = right[question.removeprefix("問題:")]
            assert len(set(choices)) == author.CHOICES
            assert [choice for choice in choices if choice in answers] == [text.rpartition("答え:")[2]]
            explained_ones += "解説" in text
    assert explained_ones > 1000


def test_explanations_are_read_back_as_the_statements_that_they_are():
    fact = world.facts()["心房細動"]["検査"]
    text = f"わかりません。{explained(fact)}心房細動の診断に用いる検査は脳波である。\n答え:心電図"
    assert statements_in(text) == [Statement("心房細動", "検査", "心電図"), Statement("心房細動", "検査", "脳波")]
    assert [statement.true for statement in statements_in(text)] == [True, False]
    for fact in FACTS:
        assert statements_in(explained(fact)) == [Statement(fact.disease, fact.attribute, fact.value)]


# --- exams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_no_disease_is_in_two_exams_or_known_to_the_base(seed):
    parts = world.split(seed)
    assert sorted(disease for part in parts.values() for disease in part) == sorted(world.facts())
    exams = corpora.exams(seed)
    for name, rows in exams.items():
        assert {row.id.split("-")[1] for row in rows} == set(parts[name])
        assert {row.case for row in rows} == {row.id for row in rows if row.case == row.id}
        assert len({row.case for row in rows}) == len(parts[name])
    every = [row for rows in exams.values() for row in rows]
    assert len({row.id for row in every}) == len(every)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_question_has_one_right_choice_and_explains_it(seed):
    for name, rows in corpora.exams(seed).items():
        for row in rows:
            fact = world.facts()[row.id.split("-")[1]][row.category]
            right = row.choices[LETTERS.index(row.answer)]
            assert len(set(row.choices)) == author.CHOICES
            if right == fact.value:
                assert all(fact.excludes(choice) for choice in row.choices if choice != right)
            else:
                assert right == fact.disease and name == "transfer"
                others = [world.facts()[disease][row.category] for disease in row.choices if disease != right]
                assert all(other.excludes(fact.value) for other in others)
            statements = statements_in(row.explanation)
            assert statements and all(told.true and told.disease == fact.disease for told in statements)
            assert not any(one in other for one in row.choices for other in row.choices if one != other)
        letters = [row.answer for row in rows]
        assert max(letters.count(letter) for letter in LETTERS[: author.CHOICES]) < 0.3 * len(rows)


def test_the_transfer_exam_asks_in_ways_that_no_other_does():
    exams = corpora.exams(0)
    trained = {row.question.replace(row.id.split("-")[1], "{d}") for row in exams["train"]}
    assert trained == {WORDINGS[attribute].questions[0] for attribute in corpora.ASKED}
    transfer = exams["transfer"]
    assert not any(row.question.replace(row.id.split("-")[1], "{d}") in trained for row in transfer)
    assert {row.category for row in transfer} == set(world.ATTRIBUTES)
    reversed_ones = [row for row in transfer if row.id.split("-")[1] not in row.question]
    assert 0.2 < len(reversed_ones) / len(transfer) < 0.4


def test_the_exam_reader_and_the_extractor_read_this_world(folder):
    template = load_template(author.TEMPLATE)
    for name in world.EXAMS:
        exam = load_exam(folder / "exam" / f"{name}.jsonl")
        for question in exam.questions:
            for condition in ("answer_only", "explain"):
                for letter, words in zip(question.letters, question.choices, strict=True):
                    text = template.condition(condition).solution.format(answer=words, explanation=question.explanation)
                    graded = grade(question, extract(question, text, "stop", condition))
                    assert graded.correct == (frozenset(letter) in question.gold), (question, text)


def test_documents_have_the_exams_own_form(folder):
    template = load_template(author.TEMPLATE)
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
    made = train_tokenizer(corpora.tokenizer_texts(), tmp_path, VOCABULARY)
    written = json.loads((made / "tokenizer.json").read_text())
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
    template = load_template(author.TEMPLATE)
    for question in load_exam(folder / "exam" / "test.jsonl").questions:
        prompt = tokenizer(template.render(question, "explain"))["input_ids"]
        assert len(prompt) < 32
