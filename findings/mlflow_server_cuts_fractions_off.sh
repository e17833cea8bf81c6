#!/usr/bin/env bash
# MLflow 3.17.2: the scoring server turns 0.9 into 0 for a model whose signature says uint8, and answers with status 200; in Python the same model refuses.
#
# A model with an input `TensorSpec(uint8, …)` gets images that were scaled to [0, 1], the most common mistake with images.
# Expected: what `load_model(…).predict` does, an error that float64 does not match uint8.
# Seen: over HTTP the JSON numbers are converted to the signature's type without a check, so the model sees a black image and predicts from it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlflow==3.17.2' 'numpy==2.4.6' 'httpx==0.28.1'
cd "$folder"
cat > model.py <<'PYTHON'
import mlflow


class Mean(mlflow.pyfunc.PythonModel):
    """Mean of each image."""

    def predict(self, context, model_input, params=None):
        return model_input.mean(axis=(1, 2)).tolist()


mlflow.models.set_model(Mean())
PYTHON
MLFLOW_DISABLE_TELEMETRY=true "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import mlflow
import numpy as np
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc import scoring_server
from mlflow.types import Schema, TensorSpec

signature = ModelSignature(inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1))]))
mlflow.pyfunc.save_model("saved", python_model="model.py", pip_requirements=[], signature=signature)
model = mlflow.pyfunc.load_model("saved")
scaled = np.full((1, 2, 2), 0.9)
answer = TestClient(scoring_server.init(model)).post("/invocations", json={"inputs": scaled.tolist()})
try:
    model.predict(scaled)
    refused = False
except MlflowException:
    refused = True
print(answer.status_code, answer.json(), "refused in Python" if refused else "accepted in Python")
assert (answer.status_code, answer.json()["predictions"], refused) == (200, [0.0], True)
PYTHON
echo "as described: the server cuts fractions off"
