"""Sphinx configuration of the manual."""

from importlib import metadata

project = "Avocado-VT job lock"
release = metadata.version("avocado-framework-plugin-vt-joblock")

nitpicky = True
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_show_copyright = False
