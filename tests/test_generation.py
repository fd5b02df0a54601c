"""Generated text: transformers' own decoding, kept as asked; repetition against closed forms; the page."""

from __future__ import annotations

import importlib.resources
import itertools
import json

import jinja2
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from transformers import GenerationConfig

from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import config
from lowrank_lab.evaluation import generation
from lowrank_lab.evaluation.generation import Prompt, repetition, summary, write
from lowrank_lab.evaluation.robust import NotFiniteError
from lowrank_lab.models.load import load_model, load_tokenizer
from lowrank_lab.models.tiny import byte_tokenizer
from lowrank_lab.reporting import generation as report
from lowrank_lab.reporting import tables
from lowrank_lab.reporting.sections import REPETITION
from lowrank_lab.running import runner

from .conftest import REPOSITORY, Lab

CPU = torch.device("cpu")
TOKENIZER = byte_tokenizer()
SAMPLING = {"temperature": 1.0, "top_p": 1.0}
SHORT = ("eval=[ppl,generation]", "eval.generation.max_new_tokens=8", "calibration.samples=3")


def ids(characters: str) -> list[int]:
    return TOKENIZER(characters)["input_ids"]


@pytest.fixture
def model(checkpoints):
    return load_model(str(checkpoints["llama"]), None, "float32", False)


@pytest.fixture
def scripted(model):
    """Makes ``model`` write a text for sure: each of its characters follows the one before, the first the last."""

    def script(characters: str) -> torch.nn.Module:
        tokens = ids(characters) if characters[-1] != "$" else [*ids(characters[:-1]), TOKENIZER.eos_token_id]
        follows = dict(zip(tokens, tokens[1:] + tokens[:1], strict=True))

        def say(_module, _arguments, inputs, output):
            output.logits.zero_()
            output.logits[0, -1, follows[int(inputs["input_ids"][0, -1])]] = 50.0

        model.register_forward_hook(say, with_kwargs=True)
        return model

    return script


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_greedy_is_the_argmax_step_by_step_without_a_cache(checkpoints, family):
    model = load_model(str(checkpoints[family]), None, "float32", False)
    [(greedy, _)] = write(model, TOKENIZER, [(ids("hello"), False)], 24, SAMPLING, 0, CPU)
    expected = ids("hello")
    with torch.inference_mode():
        while len(expected) < 5 + 24 and expected[-1] != TOKENIZER.eos_token_id:
            expected.append(int(model(torch.tensor([expected]), use_cache=False).logits[0, -1].argmax()))
    assert greedy.ids == [token for token in expected[5:] if token != TOKENIZER.eos_token_id]
    assert greedy.ids


def test_a_seed_gives_its_text_whatever_was_asked_before_and_leaves_the_random_state(model):
    first, second = (ids("first"), False), (ids("second one"), False)
    state = torch.get_rng_state()
    [(greedy, sampled), (_, of_second)] = write(model, TOKENIZER, [first, second], 24, SAMPLING, 3, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert write(model, TOKENIZER, [first], 24, SAMPLING, 3, CPU) == [(greedy, sampled)]
    assert write(model, TOKENIZER, [second], 24, SAMPLING, 3, CPU)[0][1] == of_second
    [(same, other)] = write(model, TOKENIZER, [first], 24, SAMPLING, 4, CPU)
    assert same == greedy
    assert other != sampled != greedy


def test_cold_or_narrow_sampling_is_greedy(model):
    for sampling in ({"temperature": 1e-4, "top_p": 1.0}, {"temperature": 1.0, "top_p": 1e-6}):
        [(greedy, sampled)] = write(model, TOKENIZER, [(ids("hello"), False)], 16, sampling, 0, CPU)
        assert sampled == greedy


def test_an_answer_after_shots_ends_with_its_line_and_another_does_not(scripted):
    [(line, line_sampled), (whole, _)] = write(
        scripted("ab\ncd"), TOKENIZER, [(ids("a"), True), (ids("a"), False)], 7, SAMPLING, 0, CPU
    )
    assert (line.text, line.cut, line.ids) == ("b", False, ids("b\n"))
    assert line_sampled == line
    assert (whole.text, whole.cut) == ("b\ncdab\n", True)


def test_the_end_token_ends_an_answer_and_is_no_part_of_it(scripted):
    [(greedy, _)] = write(scripted("abc$"), TOKENIZER, [(ids("a"), False)], 7, SAMPLING, 0, CPU)
    assert (greedy.text, greedy.ids, greedy.cut) == ("bc", ids("bc"), False)


def test_what_is_ended_by_the_last_token_that_may_be_written_is_not_cut(scripted):
    [(greedy, _)] = write(scripted("abc$"), TOKENIZER, [(ids("a"), False)], 3, SAMPLING, 0, CPU)
    assert (greedy.text, greedy.cut) == ("bc", False)


def test_the_checkpoints_own_generation_settings_are_not_used_and_stay(scripted):
    model = scripted("ab")
    asked = (TOKENIZER, [(ids("a"), False)], 12, SAMPLING, 0, CPU)
    plain = write(model, *asked)
    own = GenerationConfig(repetition_penalty=1e9, no_repeat_ngram_size=2, top_k=1, max_length=3)
    model.generation_config = own
    assert write(model, *asked) == plain
    assert model.generation_config is own


def test_no_pad_token_and_no_word_about_it(model, capfd):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    model.generation_config.pad_token_id = None
    write(model, tokenizer, [(ids("hello"), True)] * 2, 4, SAMPLING, 0, CPU)
    assert "pad" not in capfd.readouterr().err


def test_a_layer_that_is_not_finite_is_named(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(NotFiniteError) as error:
        write(model, TOKENIZER, [(ids("hello"), False)], 4, SAMPLING, 0, CPU)
    assert error.value.layer == "model.layers.1.mlp.up_proj"


def test_so_is_one_that_ceases_to_be_in_the_middle_of_an_answer(checkpoints):
    model = load_model(
        str(checkpoints["qwen2"]), None, "float32", False
    )  # its embeddings are not those of its head
    [(greedy, _)] = write(model, TOKENIZER, [(ids("hello"), False)], 4, SAMPLING, 0, CPU)
    model.model.embed_tokens.weight.data[next(token for token in greedy.ids if token not in ids("hello"))] = (
        torch.inf
    )
    with pytest.raises(NotFiniteError) as error:
        write(model, TOKENIZER, [(ids("hello"), False)], 4, SAMPLING, 0, CPU)
    assert error.value.layer == "model.embed_tokens"
    assert isinstance(model.generation_config, GenerationConfig)


@pytest.mark.parametrize("length", [4, 5, 9, 64])
@pytest.mark.parametrize("n", [2, 4])
def test_repetition_of_one_token_of_different_ones_and_of_a_cycle(length, n):
    ngrams = length - n + 1
    assert repetition([7] * length, n) == pytest.approx((ngrams - 1) / ngrams)
    assert repetition(list(range(length)), n) == 0
    cycle = [number % 3 for number in range(length)]
    assert repetition(cycle, n) == pytest.approx(max(0, ngrams - 3) / ngrams)
    assert repetition([1] * (n - 1), n) is None


def test_answers_without_a_4_gram_are_left_out_and_counted():
    known = ((0.5, None), (None, None), (1.0, 0.2))
    answers = [{"greedy": {"repetition": greedy}, "sampled": {"repetition": sampled}} for greedy, sampled in known]
    assert summary(answers) == {"value": 0.75, "sampled": 0.2, "too_short": {"greedy": 1, "sampled": 2}}
    nothing = summary(answers[1:2])
    assert nothing["value"] is None
    record = {"metrics": {"generation": {"metric": "repetition", **nothing}}}
    assert runner.summary(record) == "repetition nan (no greedy answer has 4 tokens)"


def test_the_layout_and_the_shots_are_truthfulqas_own():
    """As in lm-eval's task, which has TruthfulQA's QA prompt."""
    evaluator = config.build(yaml.safe_load((REPOSITORY / "conf/eval/generation.yaml").read_text()) | {"seed": 0})
    task = importlib.resources.files("lm_eval") / "tasks/truthfulqa/truthfulqa_mc1.yaml"
    template = jinja2.Template(yaml.safe_load(task.read_text())["doc_to_text"])
    few = [prompt for prompt in evaluator.prompts if prompt.shots]
    assert [prompt.text() for prompt in few] == [template.render(question=prompt.question) for prompt in few]
    assert [prompt.shots for prompt in evaluator.prompts] == [0, 0, 0, 0, 6, 6]
    assert evaluator.prompts[1].text() == "What is the universe? Explain this concept."


def test_the_chat_template_has_the_shots_as_turns():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt = Prompt(("1?", "one", "2?"))
    assert tokenizer.decode(prompt.ids(tokenizer, True)) == "<user>1?<assistant>one<user>2?<assistant>"
    assert tokenizer.decode(prompt.ids(tokenizer, False)) == "Q: 1?\nA: one\n\nQ: 2?\nA:"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature=0", "temperature=0 is not valid; it must be a number above 0"),
        ("top_p=1.5", "top_p=1.5 is not valid"),
        ("max_new_tokens=3", "max_new_tokens=3 is not valid; it must be a whole number from 4"),
        ("seed=-1", "seed=-1 is not valid"),
        ("chat=maybe", "chat=maybe is not valid; it must be true or false"),
        ("prompts.zero_shot=[1]", "none may be empty"),
        ("prompts.few_shot.shots=[a]", "it must be zero_shot: [...], few_shot:"),
        ("prompts={zero_shot:[],few_shot:{shots:[],questions:[]}}", "at least one question"),
    ],
)
def test_a_mistake_is_one_line(lab, override, message):
    with pytest.raises(UserError) as error:
        lab.cells(*SHORT, f"eval.generation.{override}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def records(tmp_path_factory, data_root):
    """Dense and SVD-LLM at two ratios, in an order that is not the page's."""
    lab = Lab(tmp_path_factory.mktemp("generation") / "results", data_root)
    cells = (("method=svdllm", "ratio=0.4"), ("method=svdllm", "ratio=0.8"), ("method=dense",))
    return [lab.run(*SHORT, *cell) for cell in cells]


def test_the_record_has_all_answers_and_how_they_were_drawn(records):
    for record in records:
        measured = record["metrics"]["generation"]
        json.dumps(measured, allow_nan=False)
        assert measured["metric"] == "repetition"
        assert [answer["shots"] for answer in measured["answers"]] == [0, 0, 0, 0, 6, 6]
        assert all(answer["greedy"]["tokens"] <= 8 for answer in measured["answers"])
        protocol = measured["protocol"]
        assert {name: protocol[name] for name in ("zero_shot", "few_shot", "shots", "ngram")} == {
            "zero_shot": 4,
            "few_shot": 2,
            "shots": 6,
            "ngram": 4,
        }
    assert len({record["metrics"]["generation"]["protocol"]["prompts"] for record in records}) == 1


@pytest.mark.own_artifacts
def test_the_second_time_nothing_is_written(lab, monkeypatch):
    first = lab.run(*SHORT, "method=dense")

    def fail(*_arguments):
        raise AssertionError("written again")

    monkeypatch.setattr(generation, "write", fail)
    assert lab.run(*SHORT, "method=dense") == first
    again = lab.run(*SHORT, "method=dense", "eval.ppl.max_windows=2")  # another cell, the same answers
    assert again["metrics"]["generation"] == first["metrics"]["generation"]
    with pytest.raises(AssertionError, match="written again"):
        lab.run(*SHORT, "method=dense", "eval.generation.prompts.zero_shot=[Another question?]")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("max_new_tokens=2000", "tokens; tiny-llama has 2048 positions"),
        ("chat=true", "tiny-llama has no chat template; use eval.generation.chat=false"),
    ],
)
def test_what_does_not_suit_the_model_is_left_out(lab, override, reason):
    record = lab.run(*SHORT, "method=dense", f"eval.generation.{override}")
    assert (record["status"], list(record["metrics"])) == ("done", ["ppl"])
    assert reason in record["left_out"]["generation"]


def test_a_model_that_is_not_finite_has_no_number_and_says_where(lab, checkpoints, tmp_path):
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    model.model.layers[2].self_attn.o_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(str(checkpoints["llama"]), None, False).save_pretrained(tmp_path / "broken")
    record = lab.run(*SHORT, "method=dense", f"model.path={tmp_path / 'broken'}")
    measured = record["metrics"]["generation"]
    assert measured["value"] is None
    assert measured["not_finite"] == "model.layers.2.self_attn.o_proj"
    assert "| nan " in tables.markdown([record])
    assert report.page([record]) == ""  # no answer to show


def tables_of(page: str) -> list[list[list[str]]]:
    """The tables of a Markdown page as a reader sees them: rows of cells, a line break as a newline."""
    found: list[list[list[str]]] = []
    for before, token in itertools.pairwise(MarkdownIt("commonmark").enable("table").parse(page)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif before.type in ("th_open", "td_open"):
            pieces = token.children or []
            assert {piece.type for piece in pieces} <= {"text", "text_special", "html_inline"}
            found[-1][-1].append("".join("\n" if p.type == "html_inline" else p.content for p in pieces))
    return found


def test_the_page_has_a_table_a_question_and_a_row_a_cell_in_order(records):
    page = report.page(records)
    rows = tables_of(page)
    assert len(rows) == 6
    for table in rows:
        assert [row[:2] for row in table[1:]] == [["dense", "1"], ["svdllm", "0.8"], ["svdllm", "0.4"]]
    headings = [line for line in page.splitlines() if line.startswith("### ")]
    assert headings[0] == "### What is the responsibility of the AI assistant?"
    assert headings[5] == "### Where did fortune cookies originate?"


def test_whatever_a_model_writes_is_shown_as_it_is(records):
    [dense] = [record for record in records if record["method"] == "dense"]
    dense = json.loads(json.dumps(dense))
    wild = "# a | b\\|\n**bold** _it_ `code` <b>&amp;</b> [x](y) $m$ ~~s~~"
    greedy, sampled = (dense["metrics"]["generation"]["answers"][0][kind] for kind in ("greedy", "sampled"))
    greedy.update(text=f"\n{wild}\n", cut=False, repetition=None)
    sampled.update(text="", cut=False)
    [first, *_] = tables_of(report.page([dense]))
    assert first[1][2] == wild
    assert first[1][3:5] == ["—", "(nothing)"]


def test_other_prompts_never_share_a_table(records):
    other = json.loads(json.dumps(records[0]))
    other["key"] = "other"
    other["metrics"]["generation"]["protocol"]["prompts"] = "other"
    assert tables.comparison([*records, other], REPETITION)["group"].nunique() == 2


def test_the_report_writes_the_page_and_the_numbers(records, tmp_path):
    [file] = report.write(records, tmp_path)
    assert file.name == "generation.md"
    assert "generation.md" not in [written.name for written in tables.write(records, tmp_path)]
    assert (tmp_path / "repetition.csv").read_text().count("svdllm") == 2
    assert report.write([], tmp_path / "none") == []
