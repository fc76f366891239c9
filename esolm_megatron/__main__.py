"""`python -m esolm_megatron` is `esolm`."""

from esolm_megatron.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
