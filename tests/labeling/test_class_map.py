"""Class maps: by index, by range, by name."""

import pytest

from uplvp_hf.labeling.naming.class_map import read_class_map, resolve_class_map

LABELS = dict(enumerate(["tench, Tinca tinca", "brown bear, bruin", "crane", "ice bear, polar bear", "crane", "bruin"]))


def test_reading(tmp_path):
    file = tmp_path / "map.yaml"
    file.write_text('bear: 2-4\ndeer: [7, "9-10", black-tailed deer]\notter: 5\n')
    assert read_class_map(file) == {"bear": [2, 3, 4], "deer": [7, 9, 10, "black-tailed deer"], "otter": [5]}
    wrong = [
        ('{"bear": [true]}', r"map.yaml, 'bear': True is neither an index"),
        ("bear: [-1]", r"'bear': -1 is neither an index"),
        ("bear: 4-2", r"'bear': the range 4-2 is empty"),
        ("bear: []", r"'bear': no class of the classifier"),
        ("[bear]", "must map class names"),
        ("bear: [", "not YAML"),
    ]
    for content, message in wrong:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_class_map(file)
    with pytest.raises(ValueError, match="no such file"):
        read_class_map(tmp_path / "missing.yaml")


def test_names_become_indices():
    got = resolve_class_map({"bear": ["Brown Bear", 3, "polar bear"], "fish": ["tinca tinca"]}, 6, LABELS)
    assert got == {"bear": [1, 3], "fish": [0]}
    assert resolve_class_map({"x": ["bruin"]}, 6, LABELS) == {"x": [5]}  # a full name before another one's synonym
    assert resolve_class_map({"bear": [0, 2]}, 3) == {"bear": [0, 2]}


@pytest.mark.parametrize(
    "class_map, labels, message",
    [
        ({"bear": [6]}, LABELS, "'bear': net has no class 6, only 0 to 5"),
        ({"bear": ["brown baer"]}, LABELS, "'bear': net has no class named 'brown baer'; it has brown bear"),
        ({"bird": ["Crane"]}, LABELS, r"'bird': net has 2 classes named 'Crane', \[2, 4\]; give the index"),
        ({"bear": ["brown bear"]}, None, "'bear': 'brown bear' is a name, but net comes without class names"),
        ({"bear": [1], "brown": ["brown bear"]}, LABELS, r"'brown' and 'bear' both claim class 1 \(brown bear"),
        ({"bear": []}, LABELS, "'bear': no class of net"),
    ],
)
def test_what_cannot_be_resolved(class_map, labels, message):
    with pytest.raises(ValueError, match=message):
        resolve_class_map(class_map, 6, labels, "net")
