"""What a run will take of each GPU, before anything is paid for: memory, traffic, time. No weights, no ranks, no GPU.

`shapes` reads the models, `zero` the DeepSpeed JSON, `feed` the objective, `setup` all of the run and the cluster;
`memory`, `traffic` and `duration` count; `plan` puts them together, `advice` plans changed runs, `table` prints. All
sizes are in bytes, all times in seconds.
"""
