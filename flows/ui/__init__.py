"""What people see in the Prefect UI: pages, tables, keys of artifacts, and fields of forms."""
