"""An example of a DAG that uses features: it waits until two feature views are fresh online, then reads them and scores payments."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param, get_current_context, task

from materialize.airflow.sensors import FreshnessSensor
from materialize.airflow.tasks import config_dir, connection

DOC = """\
Trigger it with the entity keys of some payments. It waits until `user_spending_stats` and `merchant_risk` are fresh in the store
`default`, and then prints a score for each payment: a weighted sum of features of its user and its merchant.

To score each time when features change instead, give the DAG `schedule=[asset("merchant_risk", "default")]`
(`materialize.airflow.tasks.asset`), and keep the sensors for the views that the schedule does not name.
"""
#: What a feature of the service ``payment_risk`` (config/feature_services.yaml) counts for; one without a value counts 0.
WEIGHTS = {"total_spend_7d": 0.001, "user_transactions_30d": -0.01, "risk_score": 2.0, "chargeback_rate_90d": 5.0}
VIEWS = ("user_spending_stats", "merchant_risk")
PAYMENTS = [
    {"user_id": "1", "merchant_id": "1", "country": "DE"},
    {"user_id": "2", "merchant_id": "1", "country": "FR"},
]


def score(payments: list[dict[str, str]]) -> list[float]:
    """The score of each payment, out of the features that are online now."""
    from materialize.serving import OnlineFeatures, ReadTerms

    # A task has more time than a model server.
    terms = ReadTerms(connect=5, read=5, deadline=10)
    with OnlineFeatures.connect(config_dir(Path(__file__).parent), terms=terms, connections=connection) as online:
        vectors = online.batch_read_service("payment_risk", payments).to_dicts()
    return [sum(weight * (features[name] or 0) for name, weight in WEIGHTS.items()) for features in vectors]


with DAG(
    "example_score_when_fresh",
    description="Example: wait for fresh features, then score payments",
    doc_md=DOC,
    schedule=None,
    catchup=False,
    is_paused_upon_creation=True,
    params={"payments": Param(PAYMENTS, type="array", title="Payments", description="Entity keys, as text.")},
    tags=["example"],
) as dag:

    @task(task_id="score")
    def score_payments() -> list[float]:
        payments: Any = get_current_context()["params"]["payments"]
        scores = score(payments)
        for payment, points in zip(payments, scores, strict=True):
            print(f"{payment}: {points:.3f}")  # noqa: T201 - what a task prints is in its log
        return scores

    fresh = [
        FreshnessSensor(task_id=f"{view}_is_fresh", view=view, within=timedelta(hours=2), timeout=timedelta(hours=1))
        for view in VIEWS
    ]
    fresh >> score_payments()
