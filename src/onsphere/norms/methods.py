r"""Every normalization as one row of one table.

A method says what it normalizes, which axes form one vector, whether vectors are centred, onto
which sphere they go, where eps stands, where its statistics come from and what learned gain and
shift follow. Modules, parametrizations, the study's networks and the table of invariances are all
made from these rows; adding a method is adding a row.

Layouts: activations are ``(batch, channel, *space)``, weights ``(out, in, *kernel)``.
"""

from onsphere.errors import nearest
from onsphere.norms.composites import COMPOSITES
from onsphere.norms.row import Composite, Method

_ROWS = (
    Method(
        key="bn",
        name="BatchNorm",
        normalizes="activation",
        inside=("batch", "space"),
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        statistics="batch",
        affine="channel",
        shift=True,
        scale_unit="filter",
        shifts=("bias",),
        source="Ioffe & Szegedy 2015, arXiv 1502.03167; torch.nn.BatchNorm2d",
    ),
    Method(
        key="ln",
        name="LayerNorm",
        normalizes="activation",
        inside=("channel", "space"),
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        affine="element",
        shift=True,
        scale_unit="layer",
        scale_with_bias=True,
        shifts=("layer rows",),
        source="Ba et al. 2016, arXiv 1607.06450; torch.nn.LayerNorm",
    ),
    Method(
        key="in",
        name="InstanceNorm",
        normalizes="activation",
        inside=("space",),
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        affine="channel",
        shift=True,
        scale_unit="filter",
        shifts=("bias",),
        source="Ulyanov et al. 2016, arXiv 1607.08022; torch.nn.InstanceNorm2d",
    ),
    Method(
        key="gn",
        name="GroupNorm",
        normalizes="activation",
        inside=("channel", "space"),
        grouped=True,
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        affine="channel",
        shift=True,
        scale_unit="group",
        scale_with_bias=True,
        shifts=("group rows",),
        source="Wu & He 2018, arXiv 1803.08494; torch.nn.GroupNorm",
    ),
    Method(
        key="rms",
        name="RMSNorm",
        normalizes="activation",
        inside=("channel", "space"),
        centered=False,
        radius="sqrt(n)",
        eps=None,
        affine="element",
        scale_unit="layer",
        scale_with_bias=True,
        source="Zhang & Sennrich 2019, arXiv 1910.07467; torch.nn.RMSNorm",
    ),
    Method(
        key="sbn",
        name="SyncBatchNorm",
        normalizes="activation",
        inside=("batch", "space"),
        centered=True,
        radius="sqrt(n)",
        eps=1e-05,
        statistics="batch",
        affine="channel",
        shift=True,
        scale_unit="filter",
        shifts=("bias",),
        source="Peng et al. 2018, MegDet, arXiv 1711.07240; torch.nn.SyncBatchNorm",
    ),
    Method(
        key="l1bn",
        name="L1 BatchNorm",
        normalizes="activation",
        inside=("batch", "space"),
        centered=True,
        norm="l1",
        radius="n sqrt(2/pi)",
        eps=1e-05,
        eps_place="outside",
        statistics="batch",
        affine="channel",
        shift=True,
        scale_unit="filter",
        shifts=("bias",),
        source="Hoffer et al. 2018, arXiv 1803.01814; Wu et al. 2018, arXiv 1802.09769",
    ),
    Method(
        key="frn",
        name="FilterResponseNorm",
        normalizes="activation",
        inside=("space",),
        centered=False,
        radius="sqrt(n)",
        eps=1e-06,
        affine="channel",
        shift=True,
        scale_unit="filter",
        scale_with_bias=True,
        source="Singh & Krishnan 2020, arXiv 1911.09737; its activation is ThresholdedLinearUnit",
    ),
    Method(
        key="scale",
        name="ScaleNorm",
        normalizes="activation",
        inside=("channel", "space"),
        centered=False,
        radius="1",
        eps=1e-05,
        eps_place="clamp",
        affine="scalar",
        scale_unit="layer",
        scale_with_bias=True,
        source="Nguyen & Salazar 2019, arXiv 1910.05895",
    ),
    Method(
        key="pixel",
        name="PixelNorm",
        normalizes="activation",
        inside=("channel",),
        centered=False,
        radius="sqrt(n)",
        eps=1e-08,
        affine="none",
        scale_unit="layer",
        scale_with_bias=True,
        source="Karras et al. 2018, Progressive Growing of GANs, arXiv 1710.10196",
    ),
    Method(
        key="wn",
        name="weight normalization",
        normalizes="weight",
        inside=("in", "kernel"),
        centered=False,
        radius="1",
        eps=0.0,
        affine="length",
        scale_unit="filter",
        source="Salimans & Kingma 2016, arXiv 1602.07868; torch parametrizations.weight_norm",
    ),
    Method(
        key="cwn",
        name="centred weight normalization",
        normalizes="weight",
        inside=("in", "kernel"),
        centered=True,
        radius="1",
        eps=0.0,
        affine="length",
        scale_unit="filter",
        shifts=("row entries",),
        source="Huang et al. 2017, ICCV, Centered Weight Normalization",
    ),
    Method(
        key="ws",
        name="weight standardization",
        normalizes="weight",
        inside=("in", "kernel"),
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        affine="none",
        scale_unit="filter",
        shifts=("row entries",),
        source="Qiao et al. 2019, arXiv 1903.10520",
    ),
    Method(
        key="sn",
        name="spectral normalization",
        normalizes="weight",
        inside=("out", "in", "kernel"),
        centered=False,
        norm="spectral",
        radius="1",
        eps=0.0,
        statistics="power iteration",
        affine="none",
        scale_unit="layer",
        source="Miyato et al. 2018, arXiv 1802.05957; torch parametrizations.spectral_norm",
    ),
    Method(
        key="demod",
        name="demodulation",
        normalizes="weight",
        inside=("in", "kernel"),
        centered=False,
        radius="1",
        eps=1e-08,
        affine="none",
        scale_unit="filter",
        source="Karras et al. 2020, StyleGAN2, arXiv 1912.04958; with styles: ModulatedConv2d",
    ),
    Method(
        key="ngpt",
        name="normalized weights of nGPT",
        normalizes="weight",
        inside=("in", "kernel"),
        centered=False,
        radius="1",
        eps=0.0,
        affine="none",
        scale_unit="filter",
        source="Loshchilov et al. 2024, arXiv 2410.01131, which projects after every step instead",
    ),
)

METHODS: dict[str, Method] = {row.key: row for row in _ROWS}
"""Every method that is one projection by its key, in the order of the table."""

TABLE: dict[str, Method | Composite] = {**METHODS, **COMPOSITES}
"""Every normalization by its key: one projection, several, or none."""


def method(key: str) -> Method:
    """Look a method up.

    Args:
        key: a key of :data:`METHODS`.

    Returns:
        Its row.

    Raises:
        ValueError: there is no such method, and the message lists those there are; or it is not
            one projection, and the message names its module.

    Example:
        >>> method("gn").name
        'GroupNorm'
    """
    found = TABLE.get(key.lower()) if isinstance(key, str) else None
    if found is None:
        hint = nearest(str(key), list(METHODS))
        raise ValueError(f"unknown normalization method {key!r}{hint}")
    if isinstance(found, Composite):
        raise ValueError(f"{found.name} is not one projection: use {found.module}")
    return found
