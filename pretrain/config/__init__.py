"""What a run is told: recipes, their keys and rules, the DeepSpeed JSON."""
