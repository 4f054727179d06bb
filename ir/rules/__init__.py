"""The rules of the normal form, by subject; `ridgeline.ir.normalize` applies them."""
