"""Model folders: classes in the data's order."""

import pytest

from jaxvid.errors import InputError
from jaxvid.model_folder import check_labels


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (["run", "sit"], ["run", "sit"]),
        (["Playing_guitar", "sit "], ["playing guitar", "sit"]),
        (None, ["run", "sit"]),
        (["0", "1"], ["run", "sit"]),  # nothing named them
        (["run", "sit"], ["0", "1"]),
        ([0, 1], ["run", "sit"]),
        (["1", "0"], ["1", "0"]),
    ],
)
def test_the_same_classes_are_accepted(there, here):
    check_labels(there, here, "MODEL")


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (["a", "run", "sit"], ["a", "sit", "run"], "MODEL .* 1 is 'run' there, 'sit' in the data;"),
        (["run", "sit"], ["sit", "run"], "same in another order: .*labels.txt"),
        (["run", "sit"], ["run", "fly"], "1 is 'sit' there, 'fly' in the data; name a folder"),
        (["1", "0"], ["run", "sit"], "0 is '1' there, 'run' in the data"),
        (["run", "sit"], ["run"], "MODEL has 2 classes, the data 1;"),
    ],
)
def test_other_classes_are_refused_by_the_first_difference(there, here, message):
    with pytest.raises(InputError, match=message) as error:
        check_labels(there, here, "MODEL")
    assert "\n" not in str(error.value)
