#!/usr/bin/env bash
# Put the Debian packages that the default dataset is composed from on this machine, and print the folder they lie
# under: "/" where they are installed, else the folder given. Needs apt; installs where it may, unpacks where not.
# The senses' data need espeak-ng too, which speaks only where it is installed.
# With `more` after the folder: the packages of the later sources too, desktop backgrounds (170 MB) from Debian, icons and
# names from npm, unpacked in FOLDER/npm; they come from where NPM_REGISTRY says, or from npm's own setting.
set -euo pipefail
target=${1:?usage: get_packages.sh FOLDER [more]}
packages=(tuxpaint-stamps-default openclipart-png fonts-noto-color-emoji fonts-dejavu-core fonts-dejavu-extra fonts-liberation
          gcompris-qt-data)
files=(tuxpaint/stamps openclipart/png fonts/truetype/noto/NotoColorEmoji.ttf fonts/truetype/dejavu/DejaVuSansMono-Bold.ttf
       fonts/truetype/dejavu/DejaVuSerif-Bold.ttf fonts/truetype/liberation/LiberationSans-Regular.ttf
       gcompris-qt/rcc/instruments.rcc)

if [ "${2:-}" = more ]; then
    packages+=(gnome-backgrounds plasma-workspace-wallpapers mate-backgrounds)
    files+=(backgrounds/gnome backgrounds/mate/nature wallpapers/FallenLeaf)
    registry=${NPM_REGISTRY:-$(npm config get registry 2> /dev/null || true)}
    if [ -z "$registry" ]; then
        echo "npm is not on this machine; set NPM_REGISTRY to the address of a registry of npm's packages" >&2
        exit 1
    fi
    for package in @iconify-json/fluent-emoji@1.2.7 @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
                   @iconify-json/openmoji@1.2.29 @iconify-json/flag@1.2.12 cldr-annotations-full@48.2.0 \
                   cldr-localenames-full@48.2.0; do
        full=${package%@*} version=${package##*@}
        name=${full##*/}
        [ -e "$target/npm/$name/package.json" ] && continue
        rm -rf "$target/npm/.$name"
        mkdir -p "$target/npm/.$name"
        curl -fsSL --retry 3 "${registry%/}/$full/-/$name-$version.tgz" | tar -xz -C "$target/npm/.$name" --strip-components=1
        rm -rf "${target:?}/npm/$name"
        mv "$target/npm/.$name" "$target/npm/$name"
    done
fi

complete() {
    for file in "${files[@]}"; do
        [ -e "$1/usr/share/$file" ] || return 1
    done
}

if complete ""; then
    echo /
elif complete "$target"; then
    echo "$target"
elif ! command -v apt-get > /dev/null; then
    echo "apt-get is not on this machine; unpack these Debian packages under $target: ${packages[*]}" >&2
    exit 1
elif [ "$(id -u)" = 0 ]; then
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${packages[@]}" espeak-ng >&2
    echo /
else
    # Newer Debians keep the monospaced fonts apart.
    apt-cache show fonts-dejavu-mono > /dev/null 2>&1 && packages+=(fonts-dejavu-mono)
    mkdir -p "$target/.debs"
    (cd "$target/.debs" && apt-get download -qq "${packages[@]}" >&2)
    for deb in "$target"/.debs/*.deb; do
        dpkg-deb -x "$deb" "$target"
    done
    rm -r "$target/.debs"
    echo "$target"
fi
