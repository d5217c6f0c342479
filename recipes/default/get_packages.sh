#!/usr/bin/env bash
# Put the Debian packages that the default dataset is composed from on this machine, and print the folder they lie
# under: "/" where they are installed, else the folder given. Needs apt; installs where it may, unpacks where not.
# The senses' data need espeak-ng too, which speaks only where it is installed.
set -euo pipefail
target=${1:?usage: get_packages.sh FOLDER}
packages=(tuxpaint-stamps-default openclipart-png fonts-noto-color-emoji fonts-dejavu-core fonts-dejavu-extra fonts-liberation
          gcompris-qt-data)
files=(tuxpaint/stamps openclipart/png fonts/truetype/noto/NotoColorEmoji.ttf fonts/truetype/dejavu/DejaVuSansMono-Bold.ttf
       fonts/truetype/dejavu/DejaVuSerif-Bold.ttf fonts/truetype/liberation/LiberationSans-Regular.ttf
       gcompris-qt/rcc/instruments.rcc)

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
