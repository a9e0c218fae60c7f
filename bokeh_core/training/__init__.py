"""The published training recipes. An optional part (`pip install bokeh-nodes[train]`); nodes never import it."""
