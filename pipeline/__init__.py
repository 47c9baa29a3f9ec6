"""How a run is described, launched and watched: the only place that knows both stages."""
