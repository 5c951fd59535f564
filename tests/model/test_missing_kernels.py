"""Packages with kernels that nothing here calls may say so to nobody."""

import logging

import voxtral_dist.model  # noqa: F401


def test_only_the_messages_about_kernels_are_dropped(caplog):
    said = {
        "torchao": ["Failed to load /x/_C_cutlass.so: no libcudart", "Skipping import of cpp extensions"],
        "bitsandbytes.backends.cpu.ops": ["Failed to load CPU gemm_4bit_forward from kernels-community: x", "other"],
        "bitsandbytes": ["Failed to load CPU-only bitsandbytes library"],
    }
    for name, messages in said.items():
        for message in messages:
            logging.getLogger(name).warning("%s", message)
    kept = ["Skipping import of cpp extensions", "other", "Failed to load CPU-only bitsandbytes library"]
    assert [record.getMessage() for record in caplog.records] == kept
