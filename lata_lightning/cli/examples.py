"""Two examples for every command, which run in this order beside the output of ``lata quickstart``."""

from __future__ import annotations

_MODELS = "quickstart-output/models"
_DATA = "quickstart-output/data/math.jsonl"

EXAMPLES: dict[str, tuple[str, str]] = {
    "quickstart": ("lata quickstart", "lata quickstart --output another-quickstart"),
    "fit": (
        "lata fit --config track_lora --output runs/lora",
        "lata fit --config track_full --config debug",
    ),
    "extract": (
        f"lata extract {_MODELS}/base {_MODELS}/instruct --output instruction --kind instruction",
        f"lata extract {_MODELS}/instruct {_MODELS}/math --output math-vector",
    ),
    "align": (
        "lata align math-vector --instruction instruction",
        "lata align math-vector --instruction instruction --level submodule --format json",
    ),
    "project": (
        "lata project math-vector --instruction instruction --output math-across",
        "lata project math-vector --instruction instruction --level block --output math-across-by-block",
    ),
    "inspect": ("lata inspect math-vector", f"lata inspect {_MODELS}/instruct --format json"),
    "verify": ("lata verify math-vector", "lata verify instruction"),
    "merge": (
        f"lata merge {_MODELS}/instruct math-vector {_MODELS}/string --scale 0.5 --output merged",
        f"lata merge {_MODELS}/instruct math-vector --instruction instruction --weighting linear --output merged-by-layer",
    ),
    "forget": (
        f"lata forget {_MODELS}/target quickstart-output/runs/unwanted/task_vector --weighting none --output forgotten",
        f"lata forget {_MODELS}/math math-vector --scale 0.5 --output half-forgotten",
    ),
    "export": (
        "lata export math-vector --to hf --output math-model",
        "lata export math-vector --to peft --rank 16 --output math-adapter",
    ),
    "linearity": (
        f"lata linearity {_MODELS}/instruct math-vector --data {_DATA} --samples 8",
        f"lata linearity {_MODELS}/instruct math-vector --data {_DATA} --samples 8 --format json",
    ),
    "solve": (
        f"lata solve {_MODELS}/instruct math-vector {_MODELS}/string --data {_DATA} quickstart-output/data/string.jsonl --output coefficients.json",
        f"lata solve {_MODELS}/instruct math-vector --data {_DATA} --samples 8 --output one-coefficient.json",
    ),
    "regress": (
        f"lata regress {_MODELS}/instruct math-vector {_MODELS}/string --output one-vector",
        f"lata regress {_MODELS}/instruct math-vector {_MODELS}/string --data {_DATA} quickstart-output/data/string.jsonl --output from-samples",
    ),
    "tune": (
        f"lata tune {_MODELS}/instruct math-vector --data {_DATA} --grid 0.5 1.0 --output tuned",
        f"lata tune {_MODELS}/instruct math-vector --data {_DATA} --metric perplexity --grid 0.5 1.0 --output tuned-by-perplexity",
    ),
    "evaluate": (
        f"lata evaluate merged --data {_DATA}",
        f"lata evaluate {_MODELS}/instruct --data {_DATA} --format json",
    ),
    "report": (
        "lata report quickstart-output/runs/math --output report.html",
        "lata report quickstart-output/runs/math math-vector --instruction instruction --output two.html",
    ),
    "recipes": ("lata recipes", "lata recipes --copy my-recipes"),
    "completion": ("lata completion bash > lata.bash", "lata completion fish > lata.fish"),
}
