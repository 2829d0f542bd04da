"""Texts with numbers in them."""

from patchdiffusion.system.text import counted, share


def test_nouns_and_verbs_follow_their_number():
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == [
        "0 images", "1 image", "2 images", "1,000 images",
    ]  # fmt: skip
    assert [counted(n, "class", "classes") for n in (1, 3)] == ["1 class", "3 classes"]
    shares = [share(a, b, "image", "is", "are") for a, b in ((1, 1), (1, 2), (2, 2))]
    assert shares == ["1 of 1 image is", "1 of 2 images is", "2 of 2 images are"]
