from raysearch.evaluation.item_task import ItemTask
from raysearch.evaluation.tasks import HELDOUT_CONFIGS


def test_a_task_over_items_in_memory_draws_shots_from_the_given_ones() -> None:
    items = [{"context": f"one two {n}", "target": f" {n}"} for n in range(5)]
    task = ItemTask({"task": "mine", **HELDOUT_CONFIGS["last_word"][1]}, items, items[3:])
    assert [doc["target"] for doc in task.eval_docs] == [" 0", " 1", " 2", " 3", " 4"]
    assert [doc["target"] for doc in task.sampler.fewshot_docs()] == [" 3", " 4"]
