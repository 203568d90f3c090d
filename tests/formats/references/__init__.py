"""Reference implementations of every layout: the authors' equations, computed from the raw files.

One module per format, of the same name, which defines

* ``EXPECTED``: for every example, as ``repo/address``, the fields that its configuration must have;
* ``reference(folder, x)``: latents and output for ``x [tokens, d_in]`` as the model gives it at the site,
  computed in float64 from the files in `folder` with numpy or torch alone.
"""
