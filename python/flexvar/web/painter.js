// A picture to paint a mask on. The component's value is the mask: a PNG as a data URL, white where painted; '' is none.
// Python gives the picture, as a data URL, in the property `picture`.
const find = selector => element.querySelector(selector);
const canvas = find('canvas');
const context = canvas.getContext('2d', {willReadFrequently: true});
const LONGER_SIDE = 512; // of the mask, in pixels
const MOST_UNDOS = 40;
let history = [];
let last = null;

function publish() {
  const isPainted = context.getImageData(0, 0, canvas.width, canvas.height).data.some((value, i) => i % 4 === 3 && value);
  const mask = document.createElement('canvas');
  mask.width = canvas.width;
  mask.height = canvas.height;
  const paint = mask.getContext('2d');
  paint.drawImage(canvas, 0, 0);
  paint.globalCompositeOperation = 'source-in'; // what was painted, in white
  paint.fillStyle = 'white';
  paint.fillRect(0, 0, mask.width, mask.height);
  paint.globalCompositeOperation = 'destination-over';
  paint.fillStyle = 'black';
  paint.fillRect(0, 0, mask.width, mask.height);
  props.value = isPainted ? mask.toDataURL('image/png') : '';
  find('.undo').disabled = !history.length;
  find('.clear').disabled = !isPainted;
}

function remember() {
  history.push(context.getImageData(0, 0, canvas.width, canvas.height));
  if (history.length > MOST_UNDOS) history.shift();
}

function show() {
  const picture = find('.picture');
  history = [];
  picture.onload = () => {
    const scale = LONGER_SIDE / Math.max(picture.naturalWidth, picture.naturalHeight);
    canvas.width = Math.max(1, Math.round(picture.naturalWidth * scale));
    canvas.height = Math.max(1, Math.round(picture.naturalHeight * scale));
    publish();
  };
  element.querySelector('.painter').classList.toggle('filled', Boolean(props.picture));
  if (props.picture) picture.src = props.picture;
  else publish();
}

function pointOf(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}

function stroke(from, to) {
  context.globalCompositeOperation = find('.erase').checked ? 'destination-out' : 'source-over';
  context.strokeStyle = '#f43f5e';
  context.lineWidth = find('.size').value * LONGER_SIDE / 100;
  context.lineCap = 'round';
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(...to);
  context.stroke();
}

canvas.addEventListener('pointerdown', event => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  remember();
  last = pointOf(event);
  stroke(last, last);
});
canvas.addEventListener('pointermove', event => {
  if (!last) return;
  const point = pointOf(event);
  stroke(last, point);
  last = point;
});
for (const end of ['pointerup', 'pointercancel']) {
  canvas.addEventListener(end, () => {
    if (last) publish();
    last = null;
  });
}
find('.undo').addEventListener('click', () => {
  context.putImageData(history.pop(), 0, 0);
  publish();
});
find('.clear').addEventListener('click', () => {
  remember();
  context.clearRect(0, 0, canvas.width, canvas.height);
  publish();
});

// A mask from a file: what is light becomes painted.
find('.mask').addEventListener('change', event => {
  const file = event.target.files[0];
  event.target.value = '';
  if (!file) return;
  const image = new Image();
  image.onload = () => {
    remember();
    context.globalCompositeOperation = 'source-over';
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [red, green, blue, alpha] = pixels.data.subarray(i, i + 4);
      const isLight = (0.299 * red + 0.587 * green + 0.114 * blue) * alpha / 255 >= 128;
      pixels.data.set([244, 63, 94, isLight ? 255 : 0], i);
    }
    context.putImageData(pixels, 0, 0);
    find('.problem').textContent = '';
    URL.revokeObjectURL(image.src);
    publish();
  };
  image.onerror = () => {
    find('.problem').textContent = `${file.name} is not a picture that this browser reads.`;
    URL.revokeObjectURL(image.src);
  };
  image.src = URL.createObjectURL(file);
});

watch('picture', show);
