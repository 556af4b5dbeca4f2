"""The READMEs: every command parses, every path and flag exists, and both languages say the same."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import evaluate_pope  # noqa: E402
import pope_eval  # noqa: E402
from llava import chat  # noqa: E402
from llava.data import check, mixture  # noqa: E402
from llava.data.preferences import read_desc_pairs, read_own_pairs, read_pope_pairs  # noqa: E402
from llava.data.supervision import fill_template  # noqa: E402
from llava.eval import diagnose, model_vqa_loader, pope_questions, report  # noqa: E402
from llava.eval.pope import Confusion, table_header  # noqa: E402
from llava.model import build, export  # noqa: E402
from llava.train import arguments, parsing  # noqa: E402
from llava.train.trainable import choose_parts  # noqa: E402
from slurm import flags as submit_flags  # noqa: E402
from slurm import sweep_file  # noqa: E402

ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
READMES = [ENGLISH, CHINESE]

MODEL = arguments.ModelArguments
TRAINING = {
    "train_pretrain.py": (MODEL, arguments.CaptionArguments, arguments.PretrainTrainingArguments),
    "train_dpo.py": (MODEL, arguments.PreferenceArguments, arguments.DPOTrainingArguments),
}
OTHERS = {
    "pope_eval.py": pope_eval,
    "evaluate_pope.py": evaluate_pope,
    "llava/chat.py": chat,
    "llava/data/check.py": check,
    "llava/model/build.py": build,
    "llava/model/export.py": export,
    "llava/eval/diagnose.py": diagnose,
    "llava/eval/model_vqa_loader.py": model_vqa_loader,
    "llava/eval/pope_questions.py": pope_questions,
    "llava/eval/report.py": report,
}

# What stands before a script, with the options that take one value each.
LAUNCHERS = {
    "python": set(),
    "torchrun": {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"},
    "deepspeed": {"--include", "--num_gpus", "--num_nodes", "--master_port"},
}
READ_AT_ONCE = ("--data_path", "--eval_data_path")  # must exist when the arguments are parsed

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def commands(readme: Path) -> list[list[str]]:
    """Every command of the bash blocks as words, continued lines joined, comments dropped."""
    text = "\n".join(blocks(readme.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def split_launcher(words: list[str]) -> tuple[str, list[str]]:
    """A command that runs a script, or with ``-m`` a module of ours, -> its file and arguments; unknown launcher
    options fail."""
    launcher, rest = words[0], words[1:]
    while rest and rest[0].startswith("-"):
        if rest[0] == "-m" and launcher in ("python", "torchrun"):
            return rest[1].replace(".", "/") + ".py", rest[2:]
        assert rest[0] in LAUNCHERS[launcher], f"{launcher} {rest[0]}: unknown option"
        rest = rest[2:]
    assert rest, f"{shlex.join(words)}: no script"
    return rest[0], rest[1:]


@pytest.fixture
def clean_environment() -> Iterator[None]:
    """TrainingArguments leave environment variables behind."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def parse_training(script: str, argv: list[str], folder: Path) -> tuple:
    """Parse as the script does. Data files are made in ``folder``; the ZeRO file is checked but not passed on, since
    Hugging Face keeps it in the process."""
    argv = [*argv, "--use_cpu", "True"]
    if "--deepspeed" in argv:
        at = argv.index("--deepspeed")
        config = arguments.deepspeed_config(str(ROOT / argv[at + 1]), on_cpu=True)
        assert config["zero_optimization"]["stage"] in (2, 3)
        del argv[at : at + 2]
    for flag in READ_AT_ONCE:
        if flag in argv:
            stub = folder / argv[argv.index(flag) + 1]
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.touch()
    if "--lora_weight_path" in argv:
        adapter = folder / argv[argv.index("--lora_weight_path") + 1]
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"r": 128, "lora_alpha": 256}')
    return parsing.parse(TRAINING[script], argv)


@pytest.mark.parametrize("words", commands(ENGLISH), ids=lambda words: " ".join(words)[:60])
def test_command_parses(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: None
) -> None:
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "pip":
        assert words[1:3] == ["install", "-r"]
        assert (ROOT / words[3]).is_file()
    elif words[0] == "source":
        assert words[1:] == [".venv/bin/activate"]
    elif words[0] == "tensorboard":
        assert words[1] == "--logdir"
    elif words[0] == "vllm":
        assert words[1] == "serve" and words[2] == written_by_export()
    elif words[0] == "sbatch":
        check_sbatch(ROOT / words[1], words[2:])
    else:
        assert words[0] in LAUNCHERS, f"{words[0]}: not a command that the READMEs may use"
        script, argv = split_launcher(words)
        assert (ROOT / script).is_file()
        monkeypatch.chdir(tmp_path)
        if script == "slurm/submit.py":
            args, command = submit_flags.parse_args("", argv)
            assert command or args.sweep or args.status is not None
            if not command:
                return
            script, argv = command[0], command[1:]
        if script.startswith("benchmarks/"):
            source = "".join((ROOT / file).read_text(encoding="utf-8") for file in (script, "benchmarks/duel.py"))
            assert all(f'"{word}"' in source for word in argv if word.startswith("--"))
        elif script in TRAINING:
            model_args, _, train_args = parse_training(script, argv, tmp_path)
            assert choose_parts(model_args, train_args)
        elif script.startswith("demo/"):
            assert not any(word.startswith("-") for word in argv)
        else:
            monkeypatch.setattr(sys, "argv", [script, *argv])
            OTHERS[script].parse_args()


def written_by_export() -> str:
    """The folder that the export before the served one writes."""
    words = next(w for w in commands(ENGLISH) if "llava.model.export" in w and "./checkpoints/stage2" in w)
    return words[words.index("--out") + 1]


def test_mixture_shown_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shown = blocks(ENGLISH.read_text(encoding="utf-8"), "yaml")
    monkeypatch.chdir(tmp_path)
    for source in yaml.safe_load(shown)["datasets"]:
        Path(source["json_path"]).parent.mkdir(parents=True)
        Path(source["json_path"]).touch()
    Path("mix.yaml").write_text(shown)
    folders = [folder for _, folder in mixture.sources_of("mix.yaml", None)]
    assert len(folders) == 3 and all(folders)


def test_sweep_shown_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> None:
    shown, mixed = blocks(ENGLISH.read_text(encoding="utf-8"), "yaml")
    assert blocks(CHINESE.read_text(encoding="utf-8"), "yaml") == [shown, mixed]
    monkeypatch.chdir(tmp_path)
    for text in (shown, (ROOT / "demo" / "sweep.yaml").read_text(encoding="utf-8")):
        sweep = yaml.load(text, Loader=yaml.BaseLoader)
        assert sweep.keys() <= set(sweep_file.KEYS)
        script, *argv = shlex.split(sweep["train"])
        for flag, values in sweep["grid"].items():
            argv += [f"--{flag}", values[0]]
        model_args, _, train_args = parse_training(script, [*argv, "--output_dir", "out"], tmp_path)
        assert choose_parts(model_args, train_args)
        for key in sweep.keys() & {"pope", "dev"}:
            monkeypatch.setattr(sys, "argv", ["pope_eval.py", "--model-path", "model", *shlex.split(sweep[key])])
            pope_eval.parse_args()


def check_sbatch(script: Path, argv: list[str]) -> None:
    """What our scripts run themselves is tested with them; here, what the READMEs add."""
    assert script.is_file()
    if script.stem == "pope":
        assert argv[0] in ("random", "popular", "adv", "all")
        assert len(argv) <= 2
        return
    ours = re.search(r"^run (\S+) ", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    known = options(parsing.HfArgumentParser(TRAINING[ours]))
    assert {word for word in argv if word.startswith("--")} <= known


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_hadpo_commands_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: None
) -> None:
    monkeypatch.chdir(tmp_path)
    ours, repeated = [words for words in commands(ENGLISH) if {"--desc_data_path", "--lora_enable"} <= set(words)]
    for words, parts, warmup in ((ours, {"lora"}, 0), (repeated, {"lora", "projector"}, 0.03)):
        model_args, data_args, train_args = parse_training(*split_launcher(words), tmp_path)
        assert choose_parts(model_args, train_args) == parts
        assert (train_args.beta, train_args.learning_rate, train_args.warmup_steps) == (0.1, 2e-6, warmup)
        assert (train_args.weight_decay, train_args.lora_dropout) == (0.0, 0.0)
        assert (model_args.version, data_args.image_aspect_ratio) == ("v1", "pad")


def test_every_script_has_a_command() -> None:
    shown = {split_launcher(words)[0] for words in commands(ENGLISH) if words[0] in LAUNCHERS}
    assert {script for script in shown if "/" not in script} == {path.name for path in ROOT.glob("*.py")}


def test_flags_named_in_the_text_exist(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    known = set().union(*LAUNCHERS.values())
    for classes in TRAINING.values():
        known |= options(parsing.HfArgumentParser(classes))
    with pytest.raises(SystemExit):
        submit_flags.parse_args("", ["--help"])
    known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for name, script in OTHERS.items():
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            script.parse_args()
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for readme in READMES:
        inline = " ".join(re.findall(r"`([^`]+)`", prose(readme.read_text(encoding="utf-8"))))
        unknown = set(re.findall(r"(?<![\w-])--[\w-]+", inline)) - known
        assert not unknown, f"{readme.name}: {unknown}"


def test_records_shown_are_read(tmp_path: Path) -> None:
    class Genome:
        def path(self, where: str, image_id: int | str) -> str:
            assert str(image_id).isdigit()
            return f"VG_100K/{image_id}.jpg"

    (block,) = blocks(ENGLISH.read_text(encoding="utf-8"), "json")
    chat, desc, pope, own = (json.loads(line) for line in block.splitlines())
    filled = fill_template("README", chat["conversations"], arguments.template("v1"), n_images=1)
    assert "<image>" in filled.get_prompt()
    desc_file, pope_file, own_file = (tmp_path / name for name in ("desc.json", "pope.json", "own.jsonl"))
    desc_file.write_text(json.dumps(desc))
    pope_file.write_text(json.dumps([pope]))
    own_file.write_text(json.dumps(own) + "\n")
    pairs = [
        *read_desc_pairs(str(desc_file), Genome()),
        *read_pope_pairs(str(pope_file), Genome()),
        *read_own_pairs(str(own_file), "images"),
    ]
    assert len(pairs) == 3
    assert all(pair.chosen != pair.rejected for pair in pairs)


def source_tree(readme: Path) -> list[str]:
    """Paths of the block behind the mark, folders (ending in /) joined with what is indented under them."""
    (block,) = re.findall(r"<!-- source tree -->\n```text\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.M | re.S)
    paths, parents = [], []
    for line in block.splitlines():
        depth, rest = divmod(len(line) - len(line.lstrip()), 4)
        assert rest == 0, f"indented by other than fours: {line!r}"
        name = line.split()[0]
        parents = [*parents[:depth], name]
        paths.append("".join(parents))
    return paths


def test_source_tree_exists() -> None:
    paths = source_tree(ENGLISH)
    wrong = [path for path in paths if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())]
    assert not wrong
    assert {path.name for path in ROOT.glob("*.py")} <= set(paths), "a script at the top is not listed"
    assert source_tree(CHINESE) == paths


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_links_and_table(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if not link.startswith("https://")]
    assert links
    assert all((readme.parent / link.split("#")[0]).exists() for link in links), links
    assert table_header() in text
    assert not re.search(r"@[A-Z_]+@", text)


def test_both_languages_hold_the_same() -> None:
    english, chinese = (readme.read_text(encoding="utf-8") for readme in READMES)
    assert commands(ENGLISH) == commands(CHINESE)
    assert [name for name, _ in FENCE.findall(english)] == [name for name, _ in FENCE.findall(chinese)]
    assert blocks(english, "json") == blocks(chinese, "json")
    for pattern in (r"^(#+) ", r"^\|[-:| ]+\|$"):  # headings by depth, tables by their columns
        in_english, in_chinese = (re.findall(pattern, prose(t), flags=re.MULTILINE) for t in (english, chinese))
        assert in_english == in_chinese
    rows = [len(re.findall(r"^\|", prose(t), flags=re.MULTILINE)) for t in (english, chinese)]
    assert rows[0] == rows[1]
    code = [sorted(set(re.findall(r"`([^`\n]+)`", prose(t)))) for t in (english, chinese)]
    assert code[0] == code[1]


def test_published_table_follows_from_counts() -> None:
    """TP and FP of 1500 yes and 1500 no that give HA-DPO's numbers, cut (not rounded) after two decimals."""
    counts = [(1360, 172), (1360, 274), (1360, 467), (1315, 99), (1315, 178), (1315, 371)]
    for readme in READMES:
        rows = re.findall(r"^\| LLaVA-1.5-7B \| (.*) \|$", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
        cells = [row.split(" | ") for row in rows]
        assert [c[:2] for c in cells] == [[s, m] for m in "✗✓" for s in ("random", "popular", "adversarial")]
        for (tp, fp), shown in zip(counts, cells, strict=True):
            c = Confusion(tp, fp, 1500 - fp, 1500 - tp)
            values = (c.accuracy, c.precision, c.recall, c.f1, c.yes_ratio)
            cut = [f"{math.floor(10_000 * value + 1e-9) / 100:.2f}" for value in values]
            if shown[:2] == ["popular", "✓"]:
                assert (shown[5], cut[3]) == ("87.81", "87.87")  # as the README says below the table
                cut[3] = shown[5]
            assert shown[2:] == cut


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 the authors" in text


DEMO_README = ROOT / "demo/README.md"


@pytest.mark.parametrize("words", commands(DEMO_README), ids=lambda words: " ".join(words)[:60])
def test_demo_command_parses(words: list[str]) -> None:
    if words[0] == "tensorboard":
        assert words[1] == "--logdir"
    elif words[0] == "(cd":
        assert words[1] == "demo/weights"
    else:
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        assert words[:2] == ["python", "-m"]
        source = (ROOT / (words[2].replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words[3:] if word.startswith("--"))


def test_demo_table_agrees_with_itself() -> None:
    """Half of POPE's answers are yes: precision and recall decide the other three numbers."""
    tables = [re.findall(r"^\| demo-llava \| (.*) \|$", f.read_text(encoding="utf-8"), re.MULTILINE) for f in READMES]
    assert tables[0] == tables[1]
    rows = [row.split(" | ") for row in tables[0]]
    assert [row[:2] for row in rows] == [[s, m] for m in "✗✓" for s in ("random", "popular", "adversarial")]
    for _, _, *numbers in rows:
        accuracy, precision, recall, f1, yes_ratio = map(float, numbers)
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=0.02)
        assert yes_ratio == pytest.approx(100 * recall / precision / 2, abs=0.02)
        assert accuracy == pytest.approx(50 + recall - yes_ratio, abs=0.02)
