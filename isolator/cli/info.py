"""`info`: what the daemon says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from isolator.cli.session import Session, json_option, pass_session
from isolator.cli.text import escape, fields, table, terminal_columns
from isolator.model.sizes import format_size

if TYPE_CHECKING:
    from isolator.client import Info


@click.command()
@json_option
@pass_session
def info(session: Session) -> None:
    """Show the daemon, its guarantees, and who you are to it."""
    with session.client() as client:
        found = client.info()
    session.show(found.raw, lambda: _describe(found))


def _describe(found: Info) -> str:
    components = ", ".join(
        f"{part.get('name')} {part.get('version')}"
        for part in found.engine.get("components") or ()
        if isinstance(part, dict)
    )
    caller = found.caller
    admin = " (admin: sees and may do everything)" if caller.get("admin") else ""
    defaults = found.limits.get("defaults")
    limits = ", ".join(
        f"{key} {format_size(value) if key in ('memory', 'disk') and isinstance(value, int) else value}"
        for key, value in (defaults if isinstance(defaults, dict) else {}).items()
    )
    network = found.network
    status = " ".join(str(network.get(key) or "") for key in ("status", "checked_at", "reason")).strip()
    parts = [
        fields(
            [
                ("version", found.version),
                ("instance", found.instance),
                ("backend", found.backend),
                ("engine", f"{found.engine.get('version')} (API {found.engine.get('api_version')})"),
                ("components", components or None),
                ("kernel", found.engine.get("kernel")),
                ("network", status),
                ("you are", f"{caller.get('owner')}{admin}"),
                ("an agent gets", limits or None),
                ("now", ", ".join(f"{count} {name}" for name, count in found.counts.items())),
            ]
        )
    ]
    columns = terminal_columns()
    if found.images:
        rows = [(image.name, "yes" if image.present else "NO", image.digest) for image in found.images]
        parts.append(table(("IMAGE", "PRESENT", "DIGEST"), rows, flexible=(2,), columns=columns))
    rows = [(name, "held" if each.held else "NOT HELD", each.how) for name, each in found.guarantees.items()]
    if rows:
        parts.append(table(("GUARANTEE", "", "HOW"), rows, flexible=(2,), columns=columns))
    parts += [f"degraded: {escape(each.get('detail') or each.get('code'))}" for each in found.degraded]
    return "\n\n".join(parts)
