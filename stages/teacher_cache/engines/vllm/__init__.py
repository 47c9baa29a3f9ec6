"""The teacher through vLLM: an adapter outside the engine and a capture plugin inside its workers."""
