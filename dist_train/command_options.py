"""What argparse has to know of each command's options: names, types, and the help that teaches."""

from pathlib import Path
from typing import Any

Options = dict[str, dict[str, Any]]

RUN = "the folder of a run, as `train` wrote it"
DEVICE: Options = {
    "--device": {"choices": ["auto", "cuda", "mps", "cpu"], "default": "auto", "help": "where to compute (auto)"}
}

PREPARE: Options = {
    "--dry-run": {"action": "store_true", "help": "say what would be read and written, and write nothing"}
}

TRAIN: Options = {
    "--dry-run": {
        "action": "store_true",
        "help": "say what the run would take, in FLOPs, memory for each process, and time, and train nothing",
    },
    "--processes": {"type": int, "metavar": "N", "help": "with --dry-run: on so many GPUs (1)"},
    "--gpu": {
        "metavar": "NAME",
        "help": "with --dry-run: of this kind, as H100, H200 or A100 (the one that is here, else H100)",
    },
    "--mfu": {
        "type": float,
        "metavar": "SHARE",
        "help": "with --dry-run: at this share of their peak FLOP/s (0.4)",
    },
}

LAUNCH: Options = {
    "processes": {"metavar": "N", "help": "processes on this machine: a number, or auto for one per GPU, else one"},
    "--nodes": {"type": int, "help": "machines that take part, each started by the same line (1)"},
    "--head": {"metavar": "HOST:PORT", "help": "where all nodes meet: an address of one of them and a free port"},
    "--job": {"metavar": "NAME", "help": "tells jobs apart that meet at one place (dist_train)"},
    "--max-restarts": {
        "type": int,
        "metavar": "K",
        "help": "give up after so many restarts in a row without a newer checkpoint (3)",
    },
    "--grace": {
        "type": float,
        "metavar": "SECONDS",
        "help": "from a request to stop (TERM, INT, USR1) until what still runs is killed; longer than a save (300)",
    },
    "--join": {
        "type": float,
        "metavar": "SECONDS",
        "help": "how long nodes wait for each other, at the start and after each loss (600)",
    },
}

COMPARE: Options = {
    "--processes": {
        "metavar": "N",
        "default": "auto",
        "help": "train each run with N processes: a number, or auto for one per GPU, else one (auto)",
    }
}

EVALUATE: Options = {
    "--suite": {
        "action": "append",
        "default": [],
        "metavar": "NAME[=PATH]",
        "help": "what to measure, may be given several times: held-out (losses there and on training text), "
        "text (quality of what it writes beside human text), lambada and hellaswag (tasks, from PATH or the "
        "hub)",
    },
    **DEVICE,
}

EXPORT: Options = {"saved": {"type": Path, "metavar": "RUN", "help": f"{RUN}, or of one checkpoint in it"}}

GENERATE: Options = {
    "--prompt": {
        "action": "append",
        "default": [],
        "metavar": "TEXT",
        "help": "what to continue, may be given several times; '' begins a text; - is all of standard input, as is a "
        "pipe without --prompt (the run's sample.prompt)",
    },
    "--temperature": {
        "type": float,
        "metavar": "T",
        "help": "below 1 is safer, above 1 wilder, 0 always takes the likeliest token (the run's sample.temperature)",
    },
    "--top-k": {"type": int, "metavar": "K", "help": "draw among the K likeliest tokens alone"},
    "--top-p": {"type": float, "metavar": "P", "help": "draw among the likeliest that together have probability P"},
    "--num-samples": {"type": int, "metavar": "N", "help": "texts after each prompt, one after another (1)"},
    "--max-new-tokens": {
        "type": int,
        "metavar": "N",
        "help": "stop after N tokens, or where the network ends the text (the run's sample.max_new_tokens); beyond "
        "model.block_size it sees the last tokens alone, and each takes longer",
    },
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "gives the same texts again, another others (0)"},
    "--interactive": {"action": "store_true", "help": "continue one text, to which you add a line at a time"},
    **DEVICE,
}
GENERATE_NOTES = """\
A network trained here continues a text; it does not answer. One trained on the final token alone has learned to predict
after model.block_size tokens: give it a prompt of that length.

examples:
  dist-train generate runs/quickstart --prompt "The value of" --temperature 0.7
  dist-train generate runs/quickstart --num-samples 3 --top-p 0.9 --seed 1
  dist-train generate runs/quickstart/checkpoints/step-000240 --interactive
  head -c 2000 book.txt | dist-train generate gpt2 --top-k 50 > continued.txt"""
