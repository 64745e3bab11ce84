"""Pictures as bytes: the sheet of a mask, the views of two models, previews of a scan, curves and plots."""
