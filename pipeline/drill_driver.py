"""The driver of a drill: one training of a config, in a process that may be killed.

    python -m pipeline.drill_driver CONFIG.json OUTCOME.json

Its exit code is that of the program; of an error of ours the outcome tells the kind and sentence.
"""

import json
import sys
from pathlib import Path

from pipeline.driver import run_config
from pipeline.errors import RaydiffusionError
from pipeline.settings import Config
from pipeline.workflow import Event


def main() -> None:
    """Runs the steps up to `train` as the verb of that name does."""
    config_path, outcome_path = map(Path, sys.argv[1:])
    config = Config.model_validate_json(config_path.read_text())
    try:
        outcome = run_config(config, ("train",), observer=_print)
    except RaydiffusionError as error:
        outcome_path.write_text(json.dumps({"kind": type(error).__name__, "error": str(error)}))
        raise SystemExit(error.exit_code) from error
    outcome_path.write_text(json.dumps(outcome.manifests["train"]["metrics"]))


def _print(event: Event) -> None:
    print(event.kind, event.step, json.dumps(event.fields), flush=True)


if __name__ == "__main__":
    main()
