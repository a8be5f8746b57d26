"""MLflow: curves in RUN/mlflow, a store of files, unless MLFLOW_TRACKING_URI names another one.

A run has one id, which its checkpoints keep. Steps that are done again have a second point in their curves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from minicpm_megatron.recipe import Recipe, recipe_hash
from minicpm_megatron.training.observer import RunInfo, ServiceObserver, optional_package

_EXPERIMENT = "minicpm_megatron"


class MLflow(ServiceObserver):
    """Needs the package mlflow, or mlflow-skinny."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._client: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Begin a run of MLflow, or go on with the one that the checkpoint names."""
        super().on_start(run)
        # MLflow 3.17 refuses a store of files unless it is asked for
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._mlflow = optional_package("mlflow")
        place = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlflow").resolve().as_uri()
        client = self._mlflow.MlflowClient(tracking_uri=place)
        if self.id is None:
            experiment = client.get_experiment_by_name(_EXPERIMENT)
            number = client.create_experiment(_EXPERIMENT) if experiment is None else experiment.experiment_id
            self.id = client.create_run(number, run_name=run.recipe.name).info.run_id
            client.set_tag(self.id, "recipe_hash", recipe_hash(run.recipe))
        else:
            client.update_run(self.id, status="RUNNING")
        self._client = client

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step in one call."""
        now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        self._client.log_batch(self.id, metrics=[metric(tag, value, now, step) for tag, value in values.items()])

    def on_end(self) -> None:
        """Bring the run of MLflow to its end."""
        if self._client is not None:
            self._client.set_terminated(self.id)


OBSERVER = MLflow
