"""An lm-eval task over items that we have read ourselves."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

Item = dict[str, Any]


class ItemTask(ConfigurableTask):  # type: ignore[misc]
    """An lm-eval task over items in memory; shots come from `shots`, never the item itself."""

    def __init__(self, config: Mapping[str, Any], items: Sequence[Item], shots: Sequence[Item]) -> None:
        self._items = items
        super().__init__(config={
            **config, "test_split": "test",
            "fewshot_config": {"split": "test", "process_docs": lambda _: list(shots)},
            "metadata": {"version": 1.0},
        })

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        self.dataset = {"test": Dataset.from_list(list(self._items))}
