from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from onsphere.report import Document, Figure, Panel, Reference, Series
from onsphere.report.drawing.palette import METHODS, VARIANTS
from onsphere.report.figures import DPI, draw, panels_to_svg, save, save_all, to_svg
from report.examples import ACCURACY, GROWTH, INF, ODD_PANELS, ORDINARY, growth_panel, section


def one_panel(*series: Series, **more: object) -> Figure:
    return Figure("one", "One", "", [Panel("", "x", "y", series, **more)])


def axes_of(*series: Series, **more: object):
    return draw(one_panel(*series, **more)).axes[0]


@pytest.mark.parametrize("panel", ODD_PANELS, ids=lambda panel: panel.title[:12])
def test_odd_panels_are_drawn(panel):
    assert "<svg" in to_svg(Figure("odd", "", "", [panel]))


@pytest.mark.parametrize("panel", [ODD_PANELS[i] for i in (0, 1, 3)], ids=lambda p: p.title)
def test_a_panel_without_values_says_so(panel):
    assert ">no data<" in to_svg(Figure("f", "", "", [panel]))
    assert ">no data<" not in to_svg(Figure("f", "", "", [growth_panel("BN")]))


TWO_METHODS = replace(GROWTH, panels=GROWTH.panels[:2])


@pytest.mark.parametrize("figure", [TWO_METHODS, ACCURACY], ids=lambda figure: figure.name)
def test_equal_figures_give_equal_svg(figure):
    assert to_svg(figure) == to_svg(replace(figure))
    assert panels_to_svg(figure) == panels_to_svg(replace(figure))


def test_small_multiples_form_a_grid_with_one_legend():
    picture = draw(replace(GROWTH, panels=GROWTH.panels[:7]))
    assert [ax.get_visible() for ax in picture.axes] == [True] * 7 + [False] * 2
    assert [t.get_text() for t in picture.legends[0].get_texts()] == [
        "plain", "sphere", "predicted",
    ]  # fmt: skip
    # Labels at the outside; the last panel of each column keeps its own.
    assert [bool(ax.get_ylabel()) for ax in picture.axes[:7]] == [True, False, False] * 2 + [True]
    assert [bool(ax.get_xlabel()) for ax in picture.axes[:7]] == [False] * 4 + [True] * 3


def test_letters_are_large_enough():
    picture = draw(GROWTH)
    texts = [t for t in picture.findobj(Text) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= 9
    assert (picture.get_size_inches() / (3, 3)).min() > 2.4


def test_a_key_has_one_color_everywhere():
    figure = one_panel(Series("BN, on the sphere", [1, 2], [1, 2], color="BN"))
    (line, *_), (plain, *_) = draw(figure).axes[0].lines, draw(GROWTH).axes[0].lines
    assert to_hex(line.get_color()) == METHODS["BN"].color
    assert to_hex(plain.get_color()) == VARIANTS["plain"].color


def test_intervals_are_bands_on_lines_and_bars_on_points():
    interval = {"low": [0.0, 1.0], "high": [2.0, 3.0]}
    band = axes_of(Series("a", [1, 2], [1, 2], **interval)).collections
    bars = axes_of(Series("a", [1, 2], [1, 2], style="points", **interval)).collections
    assert isinstance(band[0], PolyCollection)
    assert [path.vertices[:, 1].tolist() for path in bars[0].get_paths()] == [[0, 2], [1, 3]]


def test_values_that_a_log_axis_cannot_show_stand_at_its_edge():
    ax = axes_of(Series("a", [1, 2, 3], [1.0, 0.0, INF], style="points"), y_scale="log")
    arrows = {line.get_marker(): line.get_xydata().tolist() for line in ax.lines[1:]}
    assert arrows == {"^": [[3.0, 0.97]], "v": [[2.0, 0.03]]}
    assert ax.get_ylim()[0] > 0


def test_arrows_of_several_series_do_not_hide_each_other():
    ax = axes_of(*(Series(name, [1, 2], [1.0, INF]) for name in ("BN", "LN", "GN")))
    heights = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "^"]
    assert len(set(heights)) == len(heights) == 3


def test_a_lone_point_of_a_line_is_seen():
    ax = axes_of(Series("a", [1, 2, 3, 4], [1.0, np.nan, 2.0, 2.5]))
    assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "."] == [[1.0]]


def test_points_of_one_category_stand_side_by_side():
    first, second = draw(ACCURACY).axes[0].lines[:2]
    assert (second.get_xdata() - first.get_xdata() > 0.1).all()
    assert np.allclose((first.get_xdata() + second.get_xdata()) / 2, range(9))


def test_the_diagonal_is_y_equals_x_and_moves_no_limit():
    series = Series("a", [1, 10], [5, 500], style="points")
    scales = {"x_scale": "log", "y_scale": "log"}
    plain, ruled = axes_of(series, **scales), axes_of(
        series, references=[Reference("diagonal")], **scales
    )  # fmt: skip
    along = ruled.lines[-1].get_xydata()
    assert np.allclose(along[:, 0], along[:, 1])
    assert (plain.get_xlim(), plain.get_ylim()) == (ruled.get_xlim(), ruled.get_ylim())


def test_many_points_stay_small():
    many = np.linspace(0, 1, 200_000)
    cloud = one_panel(Series("cloud", many, np.sin(1e5 * many), style="points"))
    line = one_panel(Series("line", many, np.sin(9 * many), low=many - 1, high=many + 1))
    assert len(to_svg(cloud)) < 400_000
    assert len(to_svg(line)) < 400_000


def test_long_names_leave_room_for_the_axes():
    long = "a very long name " * 30
    panel = Panel(long, long, long, [Series(long, [0], [1])], categories=[long])
    ax = draw(Figure("f", "", "", [panel])).axes[0]
    assert min(ax.get_position().size) > 0.3


def test_text_is_never_read_as_mathematics():
    texts = draw(one_panel(Series("costs $5 and $\\frac{", [1], [1]))).legends[0].get_texts()
    assert [t.get_text() for t in texts] == ["costs $5 and $\\frac{"]
    assert not texts[0].get_parse_math()


@pytest.mark.parametrize(
    ("limits", "scale"), [((1.0, 1.0), "linear"), ((0.0, 1.0), "log"), ((0.0, INF), "linear")]
)
def test_limits_that_no_axis_can_have(limits, scale):
    with pytest.raises(ValueError, match=r"needs two different finite numbers"):
        axes_of(Series("a", [1], [1]), y_limits=limits, y_scale=scale)


def test_a_figure_without_panels():
    with pytest.raises(ValueError, match="has no panels"):
        draw(Figure("none", "", "", []))


def test_global_settings_are_left_alone():
    with mpl.rc_context({"font.size": 33, "lines.linewidth": 7}):
        before = dict(mpl.rcParams)
        svg = to_svg(ACCURACY)
        assert dict(mpl.rcParams) == before
    assert svg == to_svg(ACCURACY)


def test_save_writes_three_files_twice_the_same(tmp_path):
    first, again = save(ACCURACY, tmp_path / "a" / "b"), save(ACCURACY, tmp_path / "c")
    assert [p.name for p in first] == ["accuracy.png", "accuracy.svg", "accuracy.pdf"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert sorted(p.name for p in first[0].parent.iterdir()) == sorted(p.name for p in first)
    assert first[2].read_bytes().startswith(b"%PDF")
    assert b"<path" in first[1].read_bytes()


def test_png_has_the_size_of_the_figure(tmp_path):
    width, height = draw(ACCURACY).get_size_inches() * DPI
    assert imread(save(ACCURACY, tmp_path)[0]).shape[:2] == (int(height), int(width))


@pytest.mark.parametrize("name", ["../escape", "", "a b", "a/b", "-a", "a--b", ".hidden"])
def test_names_that_are_no_slugs(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a file"):
        save(replace(ACCURACY, name=name), tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []


def test_save_all_uses_the_colors_of_the_page(tmp_path):
    paths = save_all(replace(ORDINARY, sections=ORDINARY.sections[1:2]), tmp_path)
    assert [p.name for p in paths] == ["accuracy.png", "accuracy.svg", "accuracy.pdf"]
    assert VARIANTS["plain"].color in paths[1].read_text(encoding="utf-8")


def test_save_all_overwrites_nothing_of_its_own(tmp_path):
    twice = Document("", "", [section(name, figures=[ACCURACY]) for name in ("a", "b")])
    with pytest.raises(ValueError, match="several figures are named accuracy"):
        save_all(twice, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_save_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save(ACCURACY, tmp_path / "file" / "figures")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
