"""Raw data -> token shards. `build.build` is the entry."""
