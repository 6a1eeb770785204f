"""Container steps of the pipeline: thin KFP functions around `shike_core.stages`."""
