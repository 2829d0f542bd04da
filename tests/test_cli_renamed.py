"""Flags by their earlier names, and short forms."""

from patchdiffusion.cli.renamed import notes, present


def test_earlier_names() -> None:
    given = {"watch.grid": ["4"], "patches.mode": ["stochastic"], "batch": ["2"]}
    flags = {"preview.grid": ["4"], "patches": ["stochastic"], "batch": ["2"]}
    assert present(given, ()) == flags
    assert len(notes(given)) == 2 and notes(flags) == []


def test_a_number_is_the_weight_of_guidance() -> None:
    cfg = {"guidance": ["cfg"], "guidance.weight": ["3"]}
    assert present({"guidance": ["3"]}, ()) == cfg
    assert present({"guidance": ["1"]}, ()) == {"guidance": ["none"]}
    model = {"guidance.model": ["runs/x"]}
    assert present({"guidance": ["3"], **model}, ()) == {
        **cfg,
        **model,
        "guidance": ["autoguidance"],
    }
    for words in (["cfg"], ["nan"], [], ["1", "2"]):
        assert present({"guidance": words}, ()) == {"guidance": words}


def test_a_size_is_that_of_the_canvas_where_there_is_one() -> None:
    canvas = {"canvas": ["auto"], "canvas.size": ["64", "96"]}
    assert present({"size": ["64", "96"]}, {"canvas"}) == canvas
    assert present({"size": ["64x96"]}, {"canvas"}) == canvas
    region = present({"size": ["64"], "corner": ["0", "8"]}, {"canvas"})
    assert region["canvas"] == ["region"] and region["canvas.corner"] == ["0", "8"]
    assert present({"size": ["64"]}, {"canvas", "size"}) == {"size": ["64"]}
    assert present({"size": ["64"]}, {"batch"}) == {"size": ["64"]}
