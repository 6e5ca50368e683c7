"""Plans: meshes, sharding rules, ZeRO."""
