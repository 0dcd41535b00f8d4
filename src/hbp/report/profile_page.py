"""The page of a profile: the pictures of its cost model beside its file."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from hbp.cost.profile_file import Profile, read_profile
from hbp.report import cost_figures


def cost_pictures(profile: Profile) -> dict[str, str]:
    """Every picture of a profile, by name."""
    longest = max(sum(point.lengths) for point in profile.points)
    return {
        "seconds": cost_figures.seconds_scatter(profile.points, profile.held_out_s),
        "memory": cost_figures.memory_scatter(
            profile.points, [float(point["predicted_bytes"]) for point in profile.data["points"]]
        ),
        "time_per_token": cost_figures.time_per_token(profile.cost, 2 * longest),
        "memory_over_length": cost_figures.memory_over_length(profile.cost, 2 * longest),
    }


def write_cost_page(profile_file: Path, out: Path | None = None) -> Path:
    """Write the page of a profile file, beside it if no place is given; returns where.

    Raises:
        HbpError: not a profile with its raw points.
    """
    profile = read_profile(profile_file)
    out = out or profile_file.with_suffix(".html")
    data = profile.data
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("profile_page.html").render(
        device=data["device"],
        model=profile.model.name,
        world_size=profile.world_size,
        date=data.get("date", ""),
        n_points=len(profile.points),
        median_error=data["median_error"],
        p90_error=data["p90_error"],
        degrees=data["degrees"],
        pictures={name: Markup(svg) for name, svg in cost_pictures(profile).items()},
    )
    out.write_text(page)
    return out
