"""Classes of two lists that are the same by their names, wherever names are matched."""

import pytest
import torch

from uplvp_hf.labeling.naming.class_map import resolve_class_map
from uplvp_hf.models.class_names import match_names
from uplvp_hf.models.text_head import checked_text_features
from uplvp_hf.models.transfer import class_rows


@pytest.mark.parametrize(
    ("wanted", "known", "places"),
    [
        (["cat", "Cat"], ["Cat", "cat"], [1, 0]),
        (["Cat ", "dog"], ["dog", "cat"], [1, 0]),
        (["Cat"], ["cat", "CAT"], [None]),  # which of the two?
        (["CAT", "Cat"], ["cat"], [None, None]),
        (["Cat", "cat"], ["cat"], [None, 0]),  # the other one is taken by the equal name
        (["stra\u00dfe"], ["STRASSE"], [0]),
        ([], ["a"], []),
    ],
)
def test_names_that_are_equal_go_first(wanted, known, places):
    assert match_names(wanted, known) == places


def test_names_that_differ_in_case_are_not_swapped():
    old, new = {0: "cat", 1: "Cat"}, {0: "Cat", 1: "cat", 2: "DOG"}
    assert class_rows(old, new) == {0: 1, 1: 0}
    assert resolve_class_map({"a": ["Cat"], "b": ["cat"]}, 2, old) == {"a": [1], "b": [0]}
    with pytest.raises(ValueError, match="2 classes named 'CAT'"):
        resolve_class_map({"a": ["CAT"]}, 2, old)
    features = checked_text_features(torch.eye(2), ["Cat", "cat"], old)
    assert features.tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="No text feature for the classes: Cat"):
        checked_text_features(torch.eye(2)[:1], ["cat"], old)
