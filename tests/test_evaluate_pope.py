"""POPE scoring against recordings of RUCAIBox's evaluate.py, HA-DPO's published table, and broken input."""

from __future__ import annotations

import json
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate_pope
from llava.errors import UserError
from llava.eval.pope import (
    SETS,
    Confusion,
    answers_of,
    is_parsed,
    parse_answer,
    read_answers,
    read_labels,
    score,
    set_of,
    table_header,
    table_row,
)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "pope"
RECORDED = json.loads((GOLDEN / "pope_golden.json").read_text(encoding="utf-8"))
LABELS = GOLDEN / "annotation" / "coco_pope_random.json"
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
SUFFIX = "\nAnswer the question using a single word or phrase."
COLUMNS = "| Model | Set | HA-DPO | Accuracy | Precision | Recall | F1 Score | Yes Ratio (%) |"
HEADER = COLUMNS + "\n|---|---|---|---|---|---|---|---|"

# TP, FP of 1500 yes and 1500 no -> HA-DPO's README (accuracy, precision, recall, F1, yes ratio), cut to two decimals.
PUBLISHED = {
    ("base", "random"): (1360, 172, "89.60 88.77 90.66 89.70 51.06"),
    ("base", "popular"): (1360, 274, "86.20 83.23 90.66 86.79 54.46"),
    ("base", "adversarial"): (1360, 467, "79.76 74.43 90.66 81.75 60.90"),
    ("HA-DPO", "random"): (1315, 99, "90.53 92.99 87.66 90.25 47.13"),
    # The README prints F1 87.81 here, which contradicts its own counts: 2 * 1315 / (1315 + 178 + 1500) = 0.87871.
    ("HA-DPO", "popular"): (1315, 178, "87.90 88.07 87.66 87.87 49.76"),
    ("HA-DPO", "adversarial"): (1315, 371, "81.46 77.99 87.66 82.54 56.20"),
}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def label_row(number, label="yes", thing="dog"):
    return {"question_id": number, "image": "a.jpg", "text": f"Is there a {thing} in the image?", "label": label}


def answer_row(number, answer="Yes", **more):
    return {"question_id": number, "answer": answer, **more}


def golden_rows(name):
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


def run_main(monkeypatch, capsys, *arguments):
    """``evaluate_pope.main`` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["evaluate_pope.py", *map(str, arguments)])
    code = 0
    try:
        evaluate_pope.main()
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: run_main(monkeypatch, capsys, *arguments)


@pytest.fixture
def refused(run):
    """Run with bad input; the one error line."""

    def check(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err

    return check


# ---- the parser ------------------------------------------------------------------------------------------------------


def test_parser_equals_the_recording_but_for_the_end_token():
    differing = [a for a, p in zip(RECORDED["answers"], RECORDED["parsed"], strict=True) if parse_answer(a) != p]
    assert len(RECORDED["answers"]) == 206
    assert differing == ["No</s>", "</s>No"]  # upstream: 'yes'
    assert {parse_answer(a) for a in differing} == {"no"}


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [("There is no dog.</s>", "no"), ("Yes</s>", "yes"), ("No</s></s>", "no"), ("No</s>Yes", "no"), ("</s>", "yes")],
)
def test_the_end_token_is_taken_out_wherever_it_stands(answer, parsed):
    assert parse_answer(answer) == parsed


@pytest.mark.parametrize(
    "answer", ["Yes", "NO", "No!", "**No**", "_no_", "(no)", "no,yes", "No</s>", "It is NOT", "no\n"]
)
def test_answers_with_a_yes_or_no_are_parsed(answer):
    assert is_parsed(answer)


@pytest.mark.parametrize(
    "answer", ["", "\n", "There isn't a dog.", "I cannot tell", "A knot", "A dog. No cat.", "</s>"]
)
def test_answers_without_a_yes_or_no_are_unparsed_and_count_as_yes(answer):
    assert not is_parsed(answer)
    assert parse_answer(answer) == "yes"


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_formulas_equal_the_recorded_metrics():
    recorded = RECORDED["metrics"]
    ours = Confusion(recorded["TP"], recorded["FP"], recorded["TN"], recorded["FN"])
    assert ours.accuracy == pytest.approx(recorded["acc"], abs=1e-12)
    assert ours.precision == pytest.approx(recorded["precision"], abs=1e-12)
    assert ours.recall == pytest.approx(recorded["recall"], abs=1e-12)
    assert ours.f1 == pytest.approx(recorded["f1"], abs=1e-12)
    assert ours.yes_ratio == pytest.approx(recorded["yes_ratio"], abs=1e-12)


@pytest.mark.parametrize("name", ["answers_hadpo.jsonl", "answers_llava.jsonl"])
def test_counts_equal_the_recording_but_for_the_end_token(name):
    # Both answers that upstream misreads ('No</s>', '</s>No') have the label no: two false positives fewer.
    assert [RECORDED["labels"][RECORDED["answers"].index(a)] for a in ("No</s>", "</s>No")] == ["no", "no"]
    answers = answers_of(read_answers(GOLDEN / name), "random", name)
    ours = score(read_labels(LABELS), answers, LABELS, name)
    recorded = RECORDED["metrics"]
    counts = (recorded["TP"], recorded["FP"] - 2, recorded["TN"] + 2, recorded["FN"])
    assert (ours.tp, ours.fp, ours.tn, ours.fn) == counts


@pytest.mark.parametrize("key", PUBLISHED)
def test_published_table_is_reproduced(key):
    tp, fp, published = PUBLISHED[key]
    c = Confusion(tp, fp, 1500 - fp, 1500 - tp)
    values = (c.accuracy, c.precision, c.recall, c.f1, c.yes_ratio)
    assert " ".join(f"{int(value * 10000 + 1e-6) / 100:.2f}" for value in values) == published


@pytest.mark.parametrize("name", RECORDED["degenerate"])
def test_degenerate_recordings_give_numbers_or_a_clear_error(name, tmp_path):
    case = RECORDED["degenerate"][name]
    ids, texts = case["answer_question_ids"], case["answers"]
    answers_file = write_lines(tmp_path / "a.jsonl", [answer_row(i, t) for i, t in zip(ids, texts, strict=True)])
    labels_file = write_lines(tmp_path / "l.json", [label_row(i, t) for i, t in enumerate(case["labels"], 1)])
    if name == "label_count_longer":
        with pytest.raises(UserError, match="no answer to 1 of the 3"):  # upstream drops the third label
            score(read_labels(labels_file), read_answers(answers_file)[""], labels_file, answers_file)
        return
    if name == "label_case":
        with pytest.raises(UserError, match="line 1: label 'Yes'"):  # upstream takes the label 'No' for yes
            read_labels(labels_file)
        return
    ours = score(read_labels(labels_file), read_answers(answers_file)[""], labels_file, answers_file)
    if name == "out_of_order_question_id":
        assert ours == Confusion(tp=1, fp=0, tn=1, fn=0)  # upstream pairs by line and gets both wrong
        return
    assert (ours.tp, ours.fp, ours.tn, ours.fn) == (case["TP"], case["FP"], case["TN"], case["FN"])
    recorded = {"accuracy": "acc", "precision": "precision", "recall": "recall", "f1": "f1", "yes_ratio": "yes_ratio"}
    for ours_key, key in recorded.items():
        if case[key] is not None:  # None: upstream had crashed by then
            assert getattr(ours, ours_key) == pytest.approx(case[key], abs=1e-12)
    assert all(0.0 <= value <= 1.0 for value in (ours.accuracy, ours.precision, ours.recall, ours.f1))


def test_no_counts_at_all_divide_nothing():
    empty = Confusion(0, 0, 0, 0)
    assert set(empty.as_dict().values()) == {0}


def test_answer_order_does_not_matter(tmp_path):
    rows = golden_rows("answers_hadpo.jsonl")
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    assert shuffled != rows
    path = write_lines(tmp_path / "a.jsonl", shuffled)
    ours = score(read_labels(LABELS), read_answers(path)[""], LABELS, path)
    recorded = RECORDED["metrics"]
    assert (ours.tp, ours.fp, ours.tn, ours.fn) == (
        recorded["TP"],
        recorded["FP"] - 2,
        recorded["TN"] + 2,
        recorded["FN"],
    )


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("coco_pope_random.json", "random"),
        ("x/coco_pope_popular.json", "popular"),
        ("coco_pope_adversarial.json", "adversarial"),
        ("pope_adv.jsonl", "adversarial"),
        ("random_init/POPE-Popular.v2.jsonl", "popular"),
        ("random_init_pope_adv.jsonl", "adversarial"),
        ("advanced.jsonl", "advanced"),
        ("random/mine.jsonl", "mine"),
    ],
)
def test_set_of_file_names(path, name):
    assert set_of(path) == name


def test_labels_as_json_list(tmp_path):
    rows = [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "gqa_pope_seem_random.json"
    path.write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    labels = read_labels(path)
    assert [labels[n].label for n in sorted(labels)] == RECORDED["labels"]
    assert [label.label for label in read_labels(LABELS).values()] == RECORDED["labels"]


def test_ids_may_be_numeric_strings(tmp_path):
    labels = read_labels(write_lines(tmp_path / "l.json", [label_row("1"), label_row(2, "no")]))
    answers = read_answers(write_lines(tmp_path / "a.jsonl", [answer_row("2"), answer_row(1)]))[""]
    assert score(labels, answers, "l", "a") == Confusion(tp=1, fp=1, tn=0, fn=0)


def test_suffix_and_old_typo_are_the_same_question(tmp_path):
    rows = [answer_row(1, question=" Is there a dog in the imange?" + SUFFIX), answer_row(2, prompt=" ")]
    labels = [label_row(1), {**label_row(2, "no"), "text": ""}]
    answers = read_answers(write_lines(tmp_path / "a.jsonl", rows))[""]
    assert score(read_labels(write_lines(tmp_path / "l.json", labels)), answers, "l", "a").tp == 1


def test_labels_without_question_text_are_scored(tmp_path):
    labels = read_labels(write_lines(tmp_path / "l.json", [{"question_id": 1, "label": "yes"}]))
    answers = read_answers(write_lines(tmp_path / "a.jsonl", [answer_row(1, "", question="Anything?")]))[""]
    assert score(labels, answers, "l", "a") == Confusion(tp=1, fp=0, tn=0, fn=0, unparsed=1)


# ---- LLaVA's file of all sets ----------------------------------------------------------------------------------------

MERGED = {"adversarial": ["Yes", "Yes"], "random": ["Yes", "No"], "popular": ["No", "No"]}
MERGED_COUNTS = {"adversarial": (1, 1, 0, 0), "random": (1, 0, 1, 0), "popular": (0, 0, 1, 1)}


def merged_world(tmp_path, category):
    rows = []
    for name, texts in MERGED.items():
        for number, text in enumerate(texts, 1):
            row = {
                "question_id": OFFSETS[name] + number,
                "prompt": f"Is there a {name} in the image?{SUFFIX}",
                "text": text,
            }
            rows.append({**row, "category": name} if category else row)
    answers = write_lines(tmp_path / "llava-v1.5-7b" / "answers.jsonl", rows)
    labels = [
        write_lines(tmp_path / f"coco_pope_{name}.json", [label_row(1, "yes", name), label_row(2, "no", name)])
        for name in MERGED
    ]
    return answers, labels


@pytest.mark.parametrize("category", [True, False])
def test_merged_answers_serve_every_set(run, tmp_path, category):
    answers, labels = merged_world(tmp_path, category)
    code, out, _ = run("--answers", answers, "--labels", *labels, "--json", tmp_path / "m.json")
    assert code == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert list(metrics) == list(SETS)
    assert {n: tuple(m[k] for k in ("tp", "fp", "tn", "fn")) for n, m in metrics.items()} == MERGED_COUNTS
    assert "| llava-v1.5-7b | popular | - |" in out


def test_merged_answers_serve_one_set(run, tmp_path):
    answers, labels = merged_world(tmp_path, category=False)
    code, out, _ = run("--answers", answers, "--labels", labels[2])
    assert code == 0 and out.startswith("popular: TP 0 FP 0 TN 1 FN 1\n")


def test_category_tells_the_set_of_ids_without_offset(run, tmp_path):
    rows = [
        {"question_id": 1, "text": "No", "category": "random"},
        {"question_id": 1, "text": "Yes", "category": "adv"},
    ]
    answers = write_lines(tmp_path / "a.jsonl", rows)
    labels = write_lines(tmp_path / "pope_adv.json", [label_row(1)])
    code, out, _ = run("--answers", answers, "--labels", labels)
    assert code == 0 and out.startswith("adversarial: TP 1 FP 0 TN 0 FN 0\n")


# ---- the table and the command line ----------------------------------------------------------------------------------


def test_table_format():
    assert table_header() == HEADER
    row = table_row("llava|7b", "random", "yes", Confusion(1360, 172, 1328, 140))
    assert row == "| llava\\|7b | random | yes | 89.60 | 88.77 | 90.67 | 89.71 | 51.07 |"


def three_sets(tmp_path, model="base", folder="llava-7b/pope"):
    """Label and answer files with the published counts, in the shell's order of their names."""
    answers, labels = [], []
    for name in ("adversarial", "popular", "random"):
        tp, fp, _ = PUBLISHED[model, name]
        said = ["Yes"] * tp + ["No"] * (1500 - tp) + ["Yes"] * fp + ["No"] * (1500 - fp)
        short = {"adversarial": "adv"}.get(name, name)
        rows = [answer_row(i, text) for i, text in enumerate(said, 1)]
        answers.append(write_lines(tmp_path / folder / f"pope_{short}.jsonl", rows))
        rows = [label_row(i, "yes" if i <= 1500 else "no") for i in range(1, 3001)]
        labels.append(write_lines(tmp_path / "coco" / f"coco_pope_{name}.json", rows))
    return answers, labels


def test_command_line_prints_counts_and_table(run, tmp_path):
    answers, labels = three_sets(tmp_path)
    # Repeating the flag adds files, and the order of the files says nothing.
    code, out, err = run("--answers", *answers[:2], "--answers", answers[2], "--labels", *labels[::-1], "--hadpo", "✗")
    assert (code, err) == (0, "")
    assert out == (
        "random: TP 1360 FP 172 TN 1328 FN 140\n"
        "popular: TP 1360 FP 274 TN 1226 FN 140\n"
        "adversarial: TP 1360 FP 467 TN 1033 FN 140\n" + HEADER + "\n"
        "| llava-7b | random | ✗ | 89.60 | 88.77 | 90.67 | 89.71 | 51.07 |\n"
        "| llava-7b | popular | ✗ | 86.20 | 83.23 | 90.67 | 86.79 | 54.47 |\n"
        "| llava-7b | adversarial | ✗ | 79.77 | 74.44 | 90.67 | 81.76 | 60.90 |\n"
    )


def test_unparsed_answers_are_noted_once(run):
    code, out, err = run("--answers", GOLDEN / "answers_hadpo.jsonl", "--labels", LABELS)
    unparsed = sum(not is_parsed(answer) for answer in RECORDED["answers"])
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith(f"note: {unparsed} answers ") and out.count("note:") == 1


def test_json_file_is_whole_and_alone(run, tmp_path):
    target = tmp_path / "new" / "metrics.json"
    code, _, _ = run("--answers", GOLDEN / "answers_hadpo.jsonl", "--labels", LABELS, "--json", target)
    assert code == 0
    assert [path.name for path in target.parent.iterdir()] == ["metrics.json"]
    metrics = json.loads(target.read_text())["random"]
    assert list(metrics) == ["accuracy", "precision", "recall", "f1", "yes_ratio", "tp", "fp", "tn", "fn", "unparsed"]
    assert (metrics["tp"], metrics["fp"], metrics["tn"], metrics["fn"]) == (75, 67, 33, 31)
    assert metrics["accuracy"] == pytest.approx(108 / 206, abs=1e-12)
    assert metrics["yes_ratio"] == pytest.approx(142 / 206, abs=1e-12)


def test_model_column(run, tmp_path):
    labels = write_lines(tmp_path / "labels.json", [label_row(1)])
    for folder, arguments, model in [
        ("7b", [], "7b"),
        ("7b/pope", [], "7b"),
        ("7b", ["--model", "LLaVA-1.5"], "LLaVA-1.5"),
    ]:
        answers = write_lines(tmp_path / folder / "a.jsonl", [answer_row(1)])
        code, out, _ = run("--answers", answers, "--labels", labels, *arguments)
        # One file of each is a pair whatever they are called; the set is then the label file's stem.
        assert code == 0 and out.splitlines()[-1].startswith(f"| {model} | labels | - | 100.00 |")


def test_answers_from_a_pipe(tmp_path):
    command = f'"{sys.executable}" evaluate_pope.py --answers <(cat {GOLDEN}/answers_hadpo.jsonl) --labels {LABELS}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("random: TP 75 FP 67 TN 33 FN 31\n")


def test_json_to_stdout_from_a_shell(tmp_path):
    script = ROOT / "evaluate_pope.py"
    assert script.stat().st_mode & stat.S_IXUSR
    command = [sys.executable, script, "--answers", GOLDEN / "answers_llava.jsonl", "--labels", LABELS, "--json", "-"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["random"]["fp"] == 67
    assert HEADER in done.stderr and "random: TP 75 FP 67 TN 33 FN 31" in done.stderr


def test_scoring_imports_nothing_heavy():
    code = (
        "import sys, evaluate_pope; from llava.eval import pope; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_from_a_shell_has_no_traceback(tmp_path):
    command = [sys.executable, ROOT / "evaluate_pope.py", "--answers", tmp_path / "none.jsonl", "--labels", LABELS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --answers {tmp_path / 'none.jsonl'}: no such file\n"


@pytest.mark.parametrize("flag", ["--answer", "--set", "--Json"])
def test_unknown_and_shortened_flags_are_refused(run, flag):
    code, _, err = run("--answers", GOLDEN / "answers_hadpo.jsonl", "--labels", LABELS, flag, "x")
    assert code == 2 and flag in err


GOOD_LABELS = [label_row(1), label_row(2, "no"), label_row(3)]
GOOD_ANSWERS = [answer_row(1), answer_row(2, "No"), answer_row(3)]
BROKEN = {
    "labels: empty": ([], GOOD_ANSWERS, "labels.json: holds no records"),
    "labels: no label": ([{"question_id": 1, "text": "?"}], GOOD_ANSWERS, "labels.json: line 1: no key 'label'"),
    "labels: no id": ([{"label": "yes"}], GOOD_ANSWERS, "labels.json: line 1: no key 'question_id'"),
    "labels: odd label": ([*GOOD_LABELS, label_row(4, "maybe")], GOOD_ANSWERS, "labels.json: line 4: label 'maybe'"),
    "labels: odd id": ([label_row("1a")], GOOD_ANSWERS, "labels.json: line 1: question_id '1a'"),
    "labels: float id": ([label_row(1.0)], GOOD_ANSWERS, "labels.json: line 1: key 'question_id' must be"),
    "labels: repeated": (
        [*GOOD_LABELS, label_row("2")],
        GOOD_ANSWERS,
        "labels.json: line 4: question_id 2 was already",
    ),
    "answers: empty": (GOOD_LABELS, [], "answers.jsonl: holds no records"),
    "answers: no answer": (GOOD_LABELS, [{"question_id": 1}], "answers.jsonl: line 1: no key 'answer'"),
    "answers: null": (GOOD_LABELS, [answer_row(1, None)], "answers.jsonl: line 1: key 'answer' must be a str"),
    "answers: no id": (GOOD_LABELS, [{"answer": "Yes"}], "answers.jsonl: line 1: no key 'question_id'"),
    "answers: repeated": (
        GOOD_LABELS,
        [*GOOD_ANSWERS, answer_row(1)],
        "answers.jsonl: line 4: question_id 1 was already",
    ),
    "answers: too few": (GOOD_LABELS, GOOD_ANSWERS[:1], "no answer to 2 of the 3 questions"),
    "answers: too many": (GOOD_LABELS[:2], GOOD_ANSWERS, "1 of its 3 answers have no label"),
    "answers: not an object": (GOOD_LABELS, ["Yes"], "answers.jsonl: line 1: expected one JSON object"),
    "answers: id of no set": (GOOD_LABELS, [answer_row(30_000_001)], "question_id 30000001 lies outside"),
    "answers: label file": (GOOD_LABELS, GOOD_LABELS, "its answers are the questions"),
    "answers: question file": (
        GOOD_LABELS,
        [{**row, "text": row["text"] + SUFFIX} for row in GOOD_LABELS],
        "its answers are the questions",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_refused(refused, tmp_path, name):
    label_rows, answer_rows, message = BROKEN[name]
    labels = write_lines(tmp_path / "labels.json", label_rows)
    answers = write_lines(tmp_path / "answers.jsonl", answer_rows)
    assert message in refused("--answers", answers, "--labels", labels)


def test_repeated_id_names_both_lines(refused, tmp_path):
    answers = write_lines(tmp_path / "a.jsonl", [answer_row(7), answer_row(8), answer_row(7)])
    err = refused("--answers", answers, "--labels", LABELS)
    assert f"{answers}: line 3: question_id 7" in err and f"{answers}: line 1;" in err


def test_unanswered_questions_are_counted_and_named(refused, tmp_path):
    answers = write_lines(tmp_path / "a.jsonl", golden_rows("answers_hadpo.jsonl")[:-10])
    err = refused("--answers", answers, "--labels", LABELS)
    assert f"{answers}: no answer to 10 of the 206 questions" in err
    assert "question_id 197, 198, 199, 200, 201, ..." in err and "finish the run" in err


def test_broken_json_and_binary_files(refused, tmp_path):
    broken = tmp_path / "a.jsonl"
    broken.write_text('{"question_id": 1, "answer": "Yes"}\n{"question_id": 2, "ans')
    assert f"{broken}: broken JSON at line 2" in refused("--answers", broken, "--labels", LABELS)
    broken.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused("--answers", broken, "--labels", LABELS)
    listed = tmp_path / "l.json"
    listed.write_text("[]")
    assert "holds no records" in refused("--answers", GOLDEN / "answers_hadpo.jsonl", "--labels", listed)
    listed.write_text('[{"question_id": 1, "label": "No"}]')
    assert "record 0: label 'No'" in refused("--answers", GOLDEN / "answers_hadpo.jsonl", "--labels", listed)


def test_folders_and_missing_files(refused, tmp_path):
    assert "--labels" in refused("--answers", GOLDEN / "answers_hadpo.jsonl", "--labels", tmp_path)
    assert "no such file" in refused("--answers", GOLDEN / "answers_hadpo.jsonl", "--labels", tmp_path / "x.json")


@pytest.mark.parametrize("key", ["question", "prompt"])
def test_answers_to_another_version_of_pope(refused, tmp_path, key):
    labels = write_lines(tmp_path / "coco_pope_random.json", [label_row(1), label_row(2, "no", "car")])
    rows = [answer_row(1, **{key: label_row(1)["text"]}), answer_row(2, **{key: label_row(2, thing="bus")["text"]})]
    err = refused("--answers", write_lines(tmp_path / "a.jsonl", rows), "--labels", labels)
    assert "question_id 2 asks 'Is there a bus in the image?'" in err
    assert "'Is there a car in the image?'" in err and "version" in err


def test_answers_of_another_category(refused, tmp_path):
    labels = write_lines(tmp_path / "coco_pope_popular.json", [label_row(i) for i in range(1, 207)])
    err = refused("--answers", GOLDEN / "answers_llava.jsonl", "--labels", labels)
    assert "no answers of the set 'popular', only of: random" in err


def test_pairs_must_be_one_to_one(refused, tmp_path):
    answers, labels = three_sets(tmp_path)
    err = refused("--answers", *answers[:2], "--labels", labels[0], labels[2])
    assert all(str(path) in err for path in (*answers[:2], labels[0], labels[2]))
    assert "do not pair" in refused("--answers", *answers, "--labels", labels[0])
    assert "holds one set" in refused("--answers", answers[0], "--labels", *labels)
    twin = write_lines(tmp_path / "pope_adv.json", [label_row(1)])
    assert "are both the set 'adversarial'" in refused("--answers", answers[0], "--labels", labels[0], twin)


def test_unwritable_json(refused, tmp_path):
    arguments = ("--answers", GOLDEN / "answers_hadpo.jsonl", "--labels", LABELS, "--json")
    assert "cannot be written" in refused(*arguments, tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(*arguments, tmp_path / "file" / "m.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
