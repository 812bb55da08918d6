import pytest

from onsphere.errors import nearest

NAMES = ["growth", "gain", "sphere"]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("grwth", "; did you mean 'growth'?"),
        ("GAIN", "; did you mean 'gain'?"),
        ("spheres", "; did you mean 'sphere'?"),
        ("xyzzy", "; there are: growth, gain, sphere"),
        ("", "; there are: growth, gain, sphere"),
    ],
)
def test_the_nearest_name_is_suggested_where_one_is_near(given, hint):
    text = nearest(given, NAMES)
    assert text.startswith(hint)
    assert text.endswith("here are: growth, gain, sphere")
    assert "\n" not in text
