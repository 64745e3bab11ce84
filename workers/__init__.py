"""All side effects: files, Zarr, storage, Dask and Ray. Never Prefect."""
