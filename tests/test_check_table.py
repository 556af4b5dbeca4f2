"""Impossible rows are found in tables of any kind, and possible ones are never taken for wrong."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from llava.errors import UserError
from llava.eval.check_table import check

ROOT = Path(__file__).resolve().parent.parent
HEAD = ("Accuracy", "Precision", "Recall", "F1 Score", "Yes Ratio (%)")

# HA-DPO's README (opendatalab/HA-DPO @ 42f72c5), all models.
PUBLISHED = """\
| Model | Set | HA-DPO | Accuracy | Precision | Recall | F1 Score | Yes Ratio (%) |
|---|---|---|---|---|---|---|---|
| LLaVA-1.5-7B | random | ✗ | 89.60 | 88.77 | 90.66 | 89.70 | 51.06 |
| | popular | ✗ | 86.20 | 83.23 | 90.66 | 86.79 | 54.46 |
| | adversarial | ✗ | 79.76 | 74.43 | 90.66 | 81.75 | 60.90 |
| | random | ✓ | 90.53 | 92.99 | 87.66 | 90.25 | 47.13 |
| | popular | ✓ | 87.90 | 88.07 | 87.66 | 87.81 | 49.76 |
| | adversarial | ✓ | 81.46 | 77.99 | 87.66 | 82.54 | 56.20 |
| MiniGPT-4-Llama2-7B | random | ✗ | 51.13 | 50.57 | 99.80 | 67.13 | 98.66 |
| | popular | ✗ | 51.46 | 50.74 | 99.53 | 67.72 | 98.06 |
| | adversarial | ✗ | 51.26 | 50.64 | 99.66 | 67.16 | 98.40 |
| | random | ✓ | 86.13 | 92.81 | 78.33 | 84.96 | 42.20 |
| | popular | ✓ | 79.50 | 80.20 | 78.33 | 79.25 | 48.83 |
| | adversarial | ✓ | 75.66 | 74.36 | 78.33 | 76.29 | 52.66 |
| InstructBLIP-13B | random | ✗ | 88.70 | 85.03 | 93.93 | 89.26 | 55.23 |
| | popular | ✗ | 81.36 | 75.06 | 93.93 | 83.44 | 62.56 |
| | adversarial | ✗ | 74.50 | 67.64 | 93.93 | 78.64 | 69.43 |
| | random | ✓ | 89.83 | 93.07 | 86.06 | 89.43 | 46.23 |
| | popular | ✓ | 85.76 | 85.55 | 86.06 | 85.80 | 50.03 |
| | adversarial | ✓ | 80.70 | 77.72 | 86.06 | 81.68 | 55.36 |
"""


@pytest.fixture
def findings(tmp_path):
    """``findings(text, suffix) -> lines``, without the file's name."""

    def run(text: str, suffix: str = ".md", **options) -> list[str]:
        file = tmp_path / f"table{suffix}"
        file.write_text(text, encoding="utf-8")
        found = check(file, **options)
        assert all(line.startswith(f"{file}: line ") and "\n" not in line for line in found)
        return [line.removeprefix(f"{file}: ") for line in found]

    return run


def table(rows, columns=HEAD, set_name="popular") -> str:
    """A Markdown table of rows of figures, a model each."""
    lines = ["| Model | Set | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    lines += [f"| m{number} | {set_name} | " + " | ".join(row) + " |" for number, row in enumerate(rows)]
    return "\n".join(lines) + "\n"


def test_no_torch():
    code = "import sys, llava.eval.check_table; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- known tables


def test_the_published_table_has_three_impossible_figures(findings):
    # By counts, 1500 labels of each kind: 1315/178, 1493/1449 and 1291/218.
    assert findings(PUBLISHED) == [
        "line 7: LLaVA-1.5-7B, popular, ✓: F1 87.81 must be 87.87 (tp 1315, fp 178 of 3000): "
        "precision 88.07 and recall 87.66 allow 87.86 to 87.87",
        "line 10: MiniGPT-4-Llama2-7B, popular, ✗: F1 67.72 must be 67.22 (tp 1493, fp 1449 of 3000): "
        "precision 50.74 and recall 99.53 allow 67.21 to 67.23",
        "line 19: InstructBLIP-13B, popular, ✓: yes ratio 50.03 must be 50.30 (tp 1291, fp 218 of 3000): "
        "precision 85.55 and recall 86.06 allow 50.29 to 50.31 (half of the labels being yes)",
    ]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_has_only_the_published_fault(name):
    (found,) = check(ROOT / name)
    assert "popular" in found and "F1 87.81 must be 87.87" in found


def test_accuracy_from_precision_recall_and_yes_ratio(findings):
    for text, suffix in (
        ("precision,recall,yes ratio,accuracy\n83.28,90.67,54.43,89.62\n", ".csv"),
        ("| Precision | Recall | Yes (%) | Acc |\n|---|---|---|---|\n| 83.28 | 90.67 | 54.43 | 89.62 |\n", ".md"),
        ("Prec. & Rec. & Yes Ratio & Acc. \\\\ \\hline\n83.28 & 90.67 & 54.43 & 89.62 \\\\", ".tex"),
    ):
        (found,) = findings(text, suffix)
        assert "accuracy 89.62 must be 86.23 (tp 1360, fp 273 of 3000)" in found
        assert "precision 83.28 and recall 90.67 allow 86.23 to 86.24 (half of the labels being yes)" in found


def test_counts_are_quoted_of_the_questions_asked(findings):
    # 460 of 537 yes-questions and 102 of 537 others: precision 81.85, recall 85.66, accuracy 83.33.
    text = table([["88.33", "81.85", "85.66"]], HEAD[:3])
    assert "accuracy 88.33 must be 83.33 (tp 460, fp 102 of 1074)" in findings(text, questions=1074)[0]
    # None of 3000 questions fit: what the figures allow is said instead.
    assert re.search(r"must be 83\.3\d to 83\.3\d: precision 81\.85", findings(text, questions=50)[0])


# ---- never a false alarm


def figures(tp: int, fp: int, questions: int, yes: int | None = None) -> dict[str, Fraction]:
    yes = yes or questions // 2
    precision, recall = Fraction(tp, tp + fp) if tp + fp else Fraction(0), Fraction(tp, yes)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else Fraction(0)
    values = (Fraction(tp + questions - yes - fp, questions), precision, recall, f1, Fraction(tp + fp, questions))
    return dict(zip(HEAD, values, strict=True))


def printed(value: Fraction, decimals: int, cut: bool) -> str:
    scaled = value * 10**decimals
    whole = math.floor(scaled) if cut else math.floor(scaled + Fraction(1, 2))
    return f"{float(Fraction(whole, 10**decimals)):.{decimals}f}"


@pytest.mark.parametrize("percent", [True, False])
@pytest.mark.parametrize("decimals", [1, 2, 12])
def test_true_counts_are_never_flagged(findings, percent, decimals):
    chance = random.Random(decimals + 100 * percent)
    for questions, columns in ((3000, HEAD), (3000, chance.sample(HEAD, 3)), (1074, HEAD), (3000, HEAD[::3])):
        rows = []
        for _ in range(30):
            tp, fp = (chance.choice([0, half, *[chance.randint(0, half)] * 12]) for half in [questions // 2] * 2)
            values = figures(tp, fp, questions)
            scale, digits = (100, decimals) if percent else (1, decimals + 2)
            rows.append([printed(values[name] * scale, digits, chance.random() < 0.5) for name in columns])
        assert findings(table(rows, columns)) == []
        assert findings(table(rows, columns, set_name="")) == []


@pytest.mark.parametrize("yes", [1500, 290])
@pytest.mark.parametrize("columns", [HEAD, HEAD[:4], HEAD[:3], ("Accuracy", "F1 Score", "Yes Ratio (%)")])
def test_other_shares_of_yes_labels_are_no_fault(findings, yes, columns):
    chance = random.Random(yes)
    rows = []
    for _ in range(12):
        values = figures(chance.randint(0, yes), chance.randint(0, 2910 - yes), 2910, yes)
        rows.append([printed(values[name] * 100, 2, cut=False) for name in columns])
    assert findings(table(rows, columns, "random")) == []


def test_a_fault_among_rows_that_agree_on_another_share(findings):
    chance = random.Random(0)
    rows = []
    for number in range(6):
        values = figures(chance.randint(100, 288), chance.randint(0, 712), 1000, 288)
        values["Accuracy"] += Fraction(2 * (number == 3), 100)
        rows.append([printed(values[name] * 100, 2, cut=False) for name in HEAD[:4]])
    (found,) = findings(table(rows, HEAD[:4]))
    assert found.startswith("line 6: m3, popular: accuracy ") and "(28.8% of the labels being yes)" in found


def test_means_over_sets_and_seeds_are_no_fault(findings):
    chance = random.Random(4)
    sets, seeds = [], []
    for _ in range(20):
        tp, fp = chance.randint(1100, 1450), chance.randint(60, 260)
        runs = [figures(tp, fp + more, 3000) for more in (0, chance.randint(0, 150), chance.randint(150, 350))]
        sets.append([printed(sum(run[name] for run in runs) * 100 / 3, 2, cut=False) for name in HEAD])
        runs = [figures(tp + chance.randint(-30, 30), fp + chance.randint(-50, 50), 3000) for _ in range(3)]
        seeds.append([printed(sum(run[name] for run in runs) * 100 / 3, 2, cut=False) + " ± 1.20" for name in HEAD])
    assert findings(table(sets, set_name="mean")) == []
    assert findings(table(sets, set_name="")) == []
    assert findings(table(seeds)) == []
    # The same where the deviation, or the number of seeds, has a column of its own.
    bare = [[cell.split()[0] for cell in row] for row in seeds]
    assert findings(table([[*row, "3"] for row in bare], (*HEAD, "Seeds"))) == []
    assert findings(table([[*row, "1.2"] for row in bare], (*HEAD, "accuracy_deviation"))) == []


@pytest.mark.parametrize("column", HEAD)
def test_one_point_off_is_flagged(findings, column):
    chance = random.Random(column)
    rows = []
    for _ in range(25):
        values = figures(chance.randint(900, 1450), chance.randint(50, 700), 3000)
        values[column] += Fraction(chance.choice([-1, 1]), 100) if values[column] < 0.99 else Fraction(-1, 100)
        rows.append([printed(values[name] * 100, 2, cut=False) for name in HEAD])
    found = findings(table(rows))
    wrong = {"F1 Score": "F1", "Yes Ratio (%)": "yes ratio"}.get(column, column.lower())
    assert len(found) == 25 and all(f"popular: {wrong} " in line for line in found)


def test_one_point_off_is_flagged_over_seeds_and_sets_too(findings):
    # 86.35 = 50 + 87.66 - 51.31; precision and F1 of means prove nothing.
    right, wrong = ["86.35 ± 0.2", "99.00", "87.66 ± 0.3", "12.00", "51.31"], ["87.35 ± 0.2", "", "87.66", "", "51.31"]
    assert findings(table([right])) == []
    (found,) = findings(table([wrong]))
    assert "accuracy 87.35 must be 86.3" in found and "recall 87.66 and yes ratio 51.31" in found
    (found,) = findings(table([[cell.split(" ")[0] for cell in wrong]], set_name="average"))
    assert "m0, average: accuracy 87.35 must be 86.3" in found


# ---- over several rows


def rows_of_sets(recalls, mean=()):
    rows = [("random", "90.53", recalls[0]), ("popular", "87.90", recalls[1]), ("adversarial", "81.46", recalls[2])]
    lines = [f"| x | ✓ | {' | '.join(row)} |" for row in [*rows, *mean]]
    return "\n".join(["| Model | HA-DPO | Set | Accuracy | Recall |", "|---|---|---|---|---|", *lines])


def test_a_figure_is_named_once(findings):
    # The recall of 89.66 contradicts its row; the other set's recall and the mean below it are not named as well.
    (found,) = findings("""\
| Model | Set | Accuracy | Precision | Recall | Yes |
|---|---|---|---|---|---|
| x | random | 90.53 | 92.99 | 87.66 | 47.13 |
| x | popular | 87.90 | 88.07 | 89.66 | 49.76 |
| x | mean | 89.22 | | 87.66 | |
""")
    assert found.startswith("line 4: x, popular: recall 89.66 must be 87.66 or 87.67 (tp 1315, fp 178 of 3000)")


def test_recall_is_the_same_in_the_three_sets(findings):
    assert findings(rows_of_sets(["87.66", "87.67", "87.66"])) == []
    assert findings(rows_of_sets(["87.66", "87.93", "87.66"])) == []  # 4 of 1500 questions: the batch can do that
    (found,) = findings(rows_of_sets(["87.66", "90.66", "87.66"]))
    assert found.startswith("line 5: x, ✓: recall is 87.66 (random), 90.66 (popular), 87.66 (adversarial), but")
    assert "sampled answers may differ" in found


def test_a_mean_is_the_mean_of_the_rows_above(findings):
    recalls = ["87.66"] * 3
    assert findings(rows_of_sets(recalls, [("mean", "86.63", "87.66")])) == []
    # (90.53 + 87.90 + 81.46) / 3 = 86.63
    assert findings(rows_of_sets(recalls, [("Average", "86.73", "87.66")])) == [
        "line 6: x, ✓, Average: accuracy 86.73 must be 86.63: the mean of random, popular, adversarial"
    ]
    twice = rows_of_sets(recalls, [("popular", "87.90", "87.66"), ("mean", "80.00", "87.66")])
    assert findings(twice) == []  # which rows are meant is not clear


# ---- how tables are written


def test_markdown_marks_and_text_between_tables(findings):
    found = findings("""\
Not a | table.

> | Model \\| tuned | POPE | **Acc** | *F1* | `Yes` | Δ Accuracy |
> |:--|---|--:|---|---|---|
> | **A** | random | **90.53%** | $90.25$ | 47.13% | +0.93 [+0.10, +1.20] |
> | A | popular | 87.90 | <b>87.81</b> | _49.76_ ↑ | 300 |

## adversarial
Recall | F1 | Precision
---|---|---
87.66 | 82.54 | 77.99 †
87.66 | 82.74 | 77.99 (-1.1)

| Dataset | Rows |
|---|---|
| a | 1 |
| too | many | cells |
""")
    assert [line.partition(" must")[0] for line in found] == ["line 6: A, popular: F1 87.81", "line 12: F1 82.74"]


def test_markdown_rows_of_another_length(findings):
    text = table([["90.53", "90.25"]], ("Accuracy", "F1")) + "| x | 90.5 |\n| x | random | 90.53 | 90.25 | 1 |\n"
    assert findings(text) == ["line 4: has 2 cells, its head has 4", "line 5: has 5 cells, its head has 4"]


def test_latex(findings):
    found = findings(
        r"""
\begin{table}[t]  % 12 & 13 \\
\caption{Results on POPE.}
\begin{tabular}{@{}l l c >{\bfseries}c c c c@{}}
\toprule
\multirow{2}{*}{Model} & \multirow{2}{*}{Set} & \multicolumn{5}{c}{POPE} \\
\cmidrule(lr){3-7}
 & & Acc. $\uparrow$ & Prec. & Rec. & F1 & Yes (\%) \\
\midrule
\multirow{4}{*}{\textsc{LLaVA\_1.5} \& co} & Random & 90.53 & \textbf{92.99} & 87.66 & 90.25 & 47.13 \\
 & Popular & 87.90 & 88.07 & 87.66 & \underline{87.81} & 49.76 \\[2pt]
 & Adv. & \cellcolor{gray!20}81.46 & 77.99 & 87.66 & $82.54$ & 56.20 \\
\rowcolor{gray!20} & Avg. & 86.63 & 86.35 & 87.66 & 86.87 & 51.03 \\
\midrule
\multicolumn{7}{c}{Others} \\
X & random & $89.9_{\pm 0.3}$ & 80.0 & 92.4 {\scriptsize $\pm$ 0.2} & 90.1 & 52.5 \\
Y & random & 89.9 & 88.0 & 92.4 \\
\bottomrule
\end{tabular}
\end{table}
""",
        ".tex",
    )
    assert found == [
        "line 11: LLaVA_1.5 & co, Popular: F1 87.81 must be 87.87 (tp 1315, fp 178 of 3000): "
        "precision 88.07 and recall 87.66 allow 87.86 to 87.87",
        "line 17: has 5 cells, its head has 7",
    ]


def test_sets_side_by_side(findings):
    found = findings(
        r"""\begin{tabularx}{\linewidth}{l|cc|cc|cc}
Method & \multicolumn{2}{c|}{Random} & \multicolumn{2}{c|}{Popular} & \multicolumn{2}{c}{Adversarial} \\
 & Recall & F1 & Recall & F1 & Recall & F1 \\ \hline
a & 90.66 & 89.70 & 90.66 & 86.79 & 90.66 & 81.75 \\
b & 90.66 & 89.70 & 90.66 & 86.79 & 70.66 & 81.75 \\
\end{tabularx}""",
        ".tex",
    )
    assert len(found) == 1 and found[0].startswith("line 5: b: recall is 90.66 (random)")
    head = "| | Random Acc | Random F1 | Random Yes | Popular Acc | Popular F1 | Popular Yes |\n"
    found = findings(head + "|---|---|---|---|---|---|---|\n| a | 90.53 | 90.25 | 47.13 | 87.90 | 87.81 | 49.76 |\n")
    assert len(found) == 1 and found[0].startswith("line 3: a, popular: F1 87.81 must be 87.87")


def test_chinese_csv_in_fractions(findings):
    text = """\ufeff模型,子集,准确率,精确率,召回率,F1分数,回答“是”的比例
某模型,随机,0.9053,0.9299,0.8766,0.9025,0.4713
,流行,0.8790,0.8807,0.8766,0.8781,0.4976
,对抗,0.8146,0.7799,0.8766,0.8254,1.562
,平均,0.8663,0.8935,0.8766,0.8687,0.51
"""
    assert [line.partition(" must")[0].partition(" lies")[0] for line in findings(text, ".csv")] == [
        "line 3: 某模型, 流行: F1 0.8781",
        "line 4: 某模型, 对抗: yes ratio 1.562",
        "line 5: 某模型, 平均: precision 0.8935",
    ]


def test_other_separators_and_digits(findings):
    text = "Model;Set;Acc;F1;Yes\na;popular;87,90;87,87;49,76\nb;popular;8.790e1;87,81;49,76\n"
    (found,) = findings(text, ".csv")
    assert found.startswith("line 3: b, popular: F1 87.81 must be 87.87")
    assert findings(text.replace(",", ".").replace(";", "\t"), ".tsv")[0] == found


def test_kind_is_told_from_the_content(findings):
    row = ["87.90", "88.07", "87.66", "87.81", "49.76"]
    assert len(findings(table([row]), ".txt")) == 1
    assert len(findings(f"{' & '.join(HEAD)} \\\\\n{' & '.join(row)} \\\\\n".replace("%", "\\%"), "")) == 1
    assert len(findings(f"{','.join(HEAD)}\n{','.join(row)}\n", ".txt")) == 1


def test_rows_of_differences_and_words_are_passed_over(findings):
    rows = [["90.53", "92.99", "87.66"], ["+1.2", "+4.0", "-3.0"], ["-", "n/a", ""], ["-1.0", "-2.0", "-3.0"]]
    rows += [["87.9/88.1", "about 80", "many"]]
    assert findings(table(rows, HEAD[:3])) == []
    assert findings(table([["90.53", "192.99", "-3.00"]], HEAD[:3], "random")) == [
        "line 3: m0, random: precision 192.99 lies outside 0..100",
        "line 3: m0, random: recall -3.00 lies outside 0..100",
    ]


def test_a_yes_ratio_in_fractions_among_percents(findings):
    rows = [["90.53", "92.99", "87.66", "90.25", "0.4713"], ["81.46", "77.99", "87.66", "82.54", "0.5620"]]
    assert findings(table(rows)) == []


# ---- bad input


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.md", b"No table.\n", "no table with a column called Accuracy"),
        ("a.md", b"| Model | Size |\n|---|---|\n| a | 7 |\n", "no table with a column called Accuracy"),
        ("a.csv", b"", "no table with a column called Accuracy"),
        ("a.csv", b"Accuracy\n\xff\n", "not UTF-8 text at byte 9"),
        ("b/a.csv", None, "cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_checked(tmp_path, name, content, what):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what) as error:
        check(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
