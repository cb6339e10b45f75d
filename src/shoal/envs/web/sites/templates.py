"""All task templates of the sites, by id."""

from __future__ import annotations

from typing import Any

from shoal.envs.web.sites import admin_tasks, booking_tasks, forum_tasks, shop_tasks, wiki_tasks
from shoal.envs.web.sites.template import Template

TEMPLATES: dict[str, Template[Any]] = {
    template.id: template
    for templates in (
        shop_tasks.TEMPLATES,
        forum_tasks.TEMPLATES,
        wiki_tasks.TEMPLATES,
        booking_tasks.TEMPLATES,
        admin_tasks.TEMPLATES,
    )
    for template in templates
}

SITES = tuple(dict.fromkeys(name.partition("/")[0] for name in TEMPLATES))
"""Their names."""
