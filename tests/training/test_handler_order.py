"""Handlers in a wrong order are refused before the first step."""

from __future__ import annotations

import pytest
from monai.bundle import ConfigParser

from scripts.training.handler_order import ORDER, check_order
from tests.conftest import ROOT
from tests.training.test_training import images, small_network, trainer_of


def handlers_of(config: str) -> list:
    """Handlers without a function, with the names of those in a config."""
    listed = ConfigParser.load_config_file(ROOT / "configs" / config)["train"]["handlers"]
    return [type(item["_target_"].rpartition(".")[2], (), {})() for item in listed]


def test_order_is_about_the_handlers_of_train_json_which_keep_it():
    handlers = handlers_of("train.json")
    check_order(handlers)
    assert {name for pair in ORDER for name in pair[:2]} <= {type(handler).__name__ for handler in handlers}


@pytest.mark.parametrize("earlier, later, reason", ORDER)
def test_two_handlers_in_the_wrong_order_are_named_with_the_reason(earlier, later, reason):
    handlers = {type(handler).__name__: handler for handler in handlers_of("train.json")}
    special = type("Special", (type(handlers[later]),), {})()  # a subclass counts as its base class
    with pytest.raises(ValueError, match=f"{earlier} must come before {later} in the list of handlers: {reason}"):
        check_order([special, handlers[earlier]])


def test_trainer_checks_the_handlers_that_it_is_given():
    handlers = {type(handler).__name__: handler for handler in handlers_of("train.json")}
    with pytest.raises(ValueError, match="InitialWeights must come before TrainingSaver"):
        trainer_of(small_network(), images(1), handlers=[handlers["TrainingSaver"], handlers["InitialWeights"]])
