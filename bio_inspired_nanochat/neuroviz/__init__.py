"""Pictures of what the synapses do: callbacks and dashboards on top of training."""
