"""The node's HTTP: what clients, the gate and operators ask of it. Knows the engine by its contract only."""
